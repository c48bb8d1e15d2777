"""PostgreSQL clients at the listener: psycopg, asyncpg, and raw messages."""

from __future__ import annotations

import ssl
import struct
from typing import cast

import anyio
import asyncpg
import psycopg
import pytest
import trustme
from psycopg import generators, pq
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow

from syncd.rpc.dispatch import Limits
from tests.unit.pgwire.sql_service import WORD, framed, raw, serving, startup

pytestmark = pytest.mark.anyio
SEARCH = "SELECT key, distance FROM search(%s, %s, k => %s, filter => %s)"
FOUND = [("7", 0.5), ("\u00e4", 1.5), ('[1,"a"]', 2.5)]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("vector", ["[1, 2]", [1.0, 2.0]])
async def test_psycopg_searches_with_bound_parameters(binary: bool, vector: object) -> None:
    async with serving() as service, await service.connect() as connection:
        for _ in range(7):  # psycopg prepares the statement on the way
            cursor = await connection.execute(
                SEARCH, ("chunks", vector, 5, '{"lang": "en"}'), binary=binary
            )
            assert await cursor.fetchall() == FOUND
        asked = service.asked[-1]
        assert asked.vector in ([1.0, 2.0], b"\0\0\x80?\0\0\0@")
        assert (asked.k, asked.filter, asked.exact) == (5, {"lang": "en"}, False)


async def test_psycopg_searches_with_its_own_binding_and_cursors() -> None:
    async with serving() as service, await service.connect(autocommit=False) as connection:
        client = psycopg.AsyncClientCursor(connection)
        await client.execute(SEARCH, ("it's \\", "[1,2]", 5, "{}"))
        assert await client.fetchall() == FOUND
        assert service.asked[-1].dataset == "it's \\"
        async with connection.cursor("named") as named:
            await named.execute("SELECT key FROM search('d', '[1,2]')")
            assert await named.fetchone() == ("7",)
            assert await named.fetchall() == [("\u00e4",), ('[1,"a"]',)]
        await connection.commit()


async def test_an_error_has_sqlstate_kind_and_hint_and_aborts_the_transaction() -> None:
    async with serving() as service, await service.connect(autocommit=False) as connection:
        with pytest.raises(psycopg.errors.UndefinedTable) as raised:
            await connection.execute("SELECT * FROM search('nope', '[1]')")
        assert raised.value.diag.message_detail == "unknown_dataset"
        assert raised.value.diag.message_hint == "see: syncd datasets"
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await connection.execute("SELECT * FROM datasets()")
        await connection.rollback()
        with pytest.raises(psycopg.errors.InternalError_) as inside:
            await connection.execute("SELECT * FROM search('broken', '[1]')")
        assert inside.value.diag.message_detail == "internal_error"
        await connection.rollback()
        for text, kind in [
            ("SELECT * FROM search('d', 'x')", psycopg.errors.InvalidTextRepresentation),
            ("SELECT * FROM search('d', NULL)", psycopg.errors.NullValueNotAllowed),
            ("SELECT * FROM search('d', '[1]', 0)", psycopg.errors.InvalidParameterValue),
            ("SELECT * FROM search('d', '[1]') LIMIT -1", psycopg.errors.DataError),
            ("SELECT nope FROM search('d', '[1]')", psycopg.errors.UndefinedColumn),
        ]:
            with pytest.raises(kind) as wrong:
                await connection.execute(text.encode())
            assert wrong.value.diag.message_hint
            await connection.rollback()


async def test_limit_and_columns_choose_from_the_result() -> None:
    async with serving() as service, await service.connect() as connection:
        cursor = await connection.execute(
            "SELECT distance AS d, key FROM search('d', '[1]') LIMIT %s", (2,)
        )
        assert [column.name for column in cursor.description or ()] == ["d", "key"]
        assert await cursor.fetchall() == [(0.5, "7"), (1.5, "\u00e4")]
        cursor = await connection.execute("SELECT dataset, bytes, recall FROM datasets() LIMIT 1")
        assert await cursor.fetchall() == [("default/chunks", 1 << 40, None)]


async def test_asyncpg_searches_resets_and_pages() -> None:
    async with serving() as service:
        connection = await asyncpg.connect(
            host="127.0.0.1", port=service.port, user="u", password=WORD, database="d", ssl=False
        )
        try:
            search = "SELECT key, distance FROM search($1, $2, k => $3, filter => $4, fresh => $5)"
            rows = await connection.fetch(search, "d", "[1]", 5, '{"a": 1}', True)
            assert [tuple(row) for row in rows] == FOUND
            assert service.asked[-1].consistency == "strong"
            await connection.reset()
            async with connection.transaction():
                cursor = await connection.cursor("SELECT key FROM search($1, '[1]')", "d")
                assert [row[0] for row in await cursor.fetch(2)] == ["7", "\u00e4"]
                assert [row[0] for row in await cursor.fetch(2)] == ['[1,"a"]']
            with pytest.raises(asyncpg.FeatureNotSupportedError):
                await connection.fetch("SELECT 1")
        finally:
            await connection.close()


async def test_a_cancel_request_ends_the_search_with_57014() -> None:
    async with serving() as service, await service.connect() as connection:
        async with anyio.create_task_group() as tasks:

            async def search() -> None:
                with pytest.raises(psycopg.errors.QueryCanceled):
                    await connection.execute("SELECT * FROM search('later', '[1]')")

            tasks.start_soon(search)
            await service.waiting.wait()
            await connection.cancel_safe(timeout=10)
        await service.gone.wait()
        cursor = await connection.execute("SELECT key FROM search('d', '[1]', 1)")
        assert await cursor.fetchall() == [("7",)]


async def test_another_key_cancels_nothing() -> None:
    async with (
        serving() as service,
        await service.connect() as connection,
        anyio.create_task_group() as tasks,
    ):

        async def search() -> None:
            cursor = await connection.execute("SELECT key FROM search('later', '[1]')")
            assert len(await cursor.fetchall()) == 3

        tasks.start_soon(search)
        await service.waiting.wait()
        async with raw(service) as other:
            process = connection.info.backend_pid
            other.write(struct.pack("!IIII", 16, 80877102, process, 12345))
            assert await other.reader.read() == b""
        service.release.set()


async def test_a_client_that_leaves_cancels_its_search() -> None:
    async with serving() as service:
        connection = await service.connect()
        async with anyio.create_task_group() as tasks:

            async def search() -> None:
                with pytest.raises(psycopg.OperationalError):
                    await connection.execute("SELECT * FROM search('later', '[1]')")

            tasks.start_soon(search)
            await service.waiting.wait()
            connection.pgconn.finish()
            await service.gone.wait()
            tasks.cancel_scope.cancel()


async def test_a_wrong_password_is_28p01() -> None:
    async with serving() as service:
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            await service.connect(password=WORD[::-1])
        async with await service.connect(user="\u00fc"):
            pass


async def test_tls_is_required_once_there_is_a_certificate(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(folder / "chain.pem", append=True)
    issued.private_key_pem.write_to_path(folder / "key.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    async with serving(tls=(folder / "chain.pem", folder / "key.pem")) as service:
        with pytest.raises(psycopg.OperationalError, match="encrypted"):
            await service.connect(sslmode="disable")
        async with await service.connect(
            sslmode="verify-full", sslrootcert=str(folder / "ca.pem")
        ) as connection:
            assert connection.pgconn.ssl_in_use
            cursor = await connection.execute("SELECT key FROM search('d', '[1]', 1)")
            assert await cursor.fetchall() == [("7",)]
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        encrypted = await asyncpg.connect(
            host="127.0.0.1", port=service.port, user="u", password=WORD, database="d", ssl=context
        )
        assert len(await encrypted.fetch("SELECT * FROM search('d', '[1]')")) == 3
        await encrypted.close()
        async with raw(service) as early:  # input that would count as encrypted
            early.write(struct.pack("!II", 8, 80877103) + startup(user="u"))
            assert await early.fatal() == "08P01"
        async with raw(service) as noise:
            noise.write(struct.pack("!II", 8, 80877103))
            assert await noise.reader.readexactly(1) == b"S"
            noise.write(b"no hello" * 100)
            await noise.reader.read()


async def test_a_client_in_another_encoding_gets_its_own_characters() -> None:
    async with serving() as service, await service.connect(client_encoding="LATIN1") as connection:
        assert connection.info.encoding == "iso8859-1"
        cursor = await connection.execute("SELECT key FROM search_key(%s, '\u00fc')", ("d\u00fc",))
        assert [row[0] for row in await cursor.fetchall()] == ["7", "\u00e4", '[1,"a"]']
        assert (service.asked[-1].dataset, service.asked[-1].key) == ("d\u00fc", "\u00fc")
        service.keys = ["\u4e2d"]
        with pytest.raises(psycopg.errors.UntranslatableCharacter):
            await connection.execute("SELECT key FROM search('d', '[1]')")
        await connection.execute("SET client_encoding TO 'UTF8'")
        cursor = await connection.execute("SELECT key FROM search('d', '[1]')")
        assert await cursor.fetchall() == [("\u4e2d",)]


async def test_a_newer_protocol_and_unknown_options_are_negotiated() -> None:
    async with serving() as service:
        for code in (0x30002, 0x3270F):
            async with raw(service) as client:
                client.write(startup(code, user="u", **{"_pq_.x": "1"}))
                kind, payload = await client.message()
                assert (kind, payload) == (b"v", struct.pack("!II", 0x30002, 1) + b"_pq_.x\0")
                kind, payload = await client.message()
                assert (kind, payload[4:]) == (b"R", b"SCRAM-SHA-256\0\0")
        async with raw(service) as client:
            client.write(startup(0x20000, user="u"))
            assert await client.fatal() == "0A000"


async def sent(
    connection: psycopg.AsyncConnection[TupleRow], function: str, *arguments: object
) -> PGresult:
    """The result of one of libpq's own functions."""
    getattr(connection.pgconn, function)(*arguments)
    results = await connection.wait(generators.execute(connection.pgconn))
    return cast("PGresult", results[0])


async def test_a_prepared_statement_is_described() -> None:
    async with serving() as service, await service.connect() as connection:
        text = b"SELECT key FROM search($1, '[1]', k => $2)"
        assert (
            await sent(connection, "send_prepare", b"p", text)
        ).status == pq.ExecStatus.COMMAND_OK
        described = await sent(connection, "send_describe_prepared", b"p")
        types = [described.param_type(place) for place in range(described.nparams)]
        assert (types, described.fname(0), described.ftype(0)) == ([25, 23], b"key", 25)
        rows = await sent(connection, "send_query_prepared", b"p", [b"d", b"2"])
        assert [rows.get_value(place, 0) for place in range(rows.ntuples)] == [
            b"7",
            "\u00e4".encode(),
        ]
        again = await sent(connection, "send_prepare", b"p", text)
        assert again.error_field(pq.DiagnosticField.SQLSTATE) == b"42P05"
        missing = await sent(connection, "send_query_prepared", b"q", [])
        assert missing.error_field(pq.DiagnosticField.SQLSTATE) == b"26000"
        few = await sent(connection, "send_query_prepared", b"p", [b"d"])
        assert few.error_field(pq.DiagnosticField.SQLSTATE) == b"08P01"


async def test_pipelined_statements_after_an_error_are_skipped_until_sync() -> None:
    async with serving() as service, await service.connect() as connection:
        async with connection.pipeline() as pipeline:
            first = await connection.execute("SELECT key FROM search('d', '[1]', %s)", (1,))
            await connection.execute("SELECT key FROM search('nope', '[1]', %s)", (1,))
            with pytest.raises(psycopg.errors.UndefinedTable):
                await pipeline.sync()
            assert await first.fetchall() == [("7",)]
        cursor = await connection.execute("SELECT key FROM search('d', '[1]', 1)")
        assert await cursor.fetchall() == [("7",)]


async def test_settings_and_transactions_are_accepted_without_effect() -> None:
    async with serving() as service, await service.connect() as connection:
        await connection.execute("SET application_name = 'mine'; SET TimeZone TO DEFAULT")
        cursor = await connection.execute("SHOW application_name")
        assert await cursor.fetchone() == ("mine",)
        cursor = await connection.execute("SHOW TRANSACTION ISOLATION LEVEL")
        assert await cursor.fetchone() == ("read committed",)
        async with connection.transaction(), connection.transaction():
            await connection.execute("SELECT * FROM datasets()")
        assert connection.info.transaction_status == pq.TransactionStatus.IDLE
        cursor = await connection.execute(
            "SELECT pg_advisory_unlock_all(); DISCARD ALL; CLOSE ALL; RESET ALL; UNLISTEN *"
        )
        assert cursor.statusmessage is not None


async def test_what_a_connection_keeps_is_bounded() -> None:
    async with serving() as service, await service.connect() as connection:
        big = b"SELECT * FROM search('" + b"x" * (1 << 20) + b"', '[1]')"
        statuses = [
            (await sent(connection, "send_prepare", b"p%d" % number, big)).error_field(
                pq.DiagnosticField.SQLSTATE
            )
            for number in range(20)
        ]
        assert statuses[:10] == [None] * 10
        assert statuses[-1] == b"53200"
        await connection.execute("DEALLOCATE ALL")
        assert (
            await sent(connection, "send_prepare", b"p", big)
        ).status == pq.ExecStatus.COMMAND_OK


async def test_a_stop_answers_what_runs_and_tells_the_others() -> None:
    async with serving() as service:
        busy, idle = await service.connect(), await service.connect()
        async with anyio.create_task_group() as tasks:

            async def search() -> None:
                cursor = await busy.execute("SELECT key FROM search('later', '[1]')")
                assert len(await cursor.fetchall()) == 3

            tasks.start_soon(search)
            await service.waiting.wait()
            service.server.stop()
            while not service.server.stopping:
                await service.turn()
            with pytest.raises(psycopg.errors.AdminShutdown):
                await idle.execute("SELECT * FROM datasets()")
            service.release.set()
        await busy.close()
        await idle.close()


async def test_an_idle_session_that_reads_nothing_does_not_delay_a_stop() -> None:
    limits = Limits(linger_seconds=600, stop_seconds=600)
    async with serving(limits) as service, raw(service) as idle:
        await idle.log_in()
        service.server.stop()
        await service.stopped.wait()
        assert await idle.fatal() == "57P01"


async def test_beyond_the_limit_of_connections_a_client_is_told_so() -> None:
    async with serving(Limits(connections=2)) as service:
        async with await service.connect(), await service.connect():
            with pytest.raises(psycopg.OperationalError, match="already open"):
                await service.connect()
        async with await service.connect():
            pass


async def test_a_login_that_takes_too_long_is_ended() -> None:
    async with serving(Limits(authenticate_seconds=0.05)) as service, raw(service) as client:
        client.write(startup(user="u"))
        assert await client.fatal() == "57014"


@pytest.mark.parametrize(
    ("data", "sqlstate"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "08P01"),
        (struct.pack("!II", 7, 0x30000), "08P01"),
        (struct.pack("!II", 1 << 31, 0x30000), "08P01"),
        (struct.pack("!II", 12, 0x30000) + b"abcd", "08P01"),
        (startup(user="u") + framed(b"Q", b"x\0"), "08P01"),
        (startup(user="u") + b"p\0\0\0\3", "08P01"),
        (startup(user="u") + b"p\xff\0\0\0", "54000"),
        (startup(user="u") + framed(b"p", b"SCRAM-SHA-256-PLUS\0\0\0\0\0"), "08P01"),
        (startup(user="u") + framed(b"p", b"SCRAM-SHA-256\0\0\0\0\1x"), "28P01"),
        (startup(user="u") + framed(b"p", b"x"), "28P01"),
        (startup(user="u", replication="database"), "0A000"),
    ],
)
async def test_noise_before_the_login_ends_that_connection_only(data: bytes, sqlstate: str) -> None:
    async with serving() as service, await service.connect() as other:
        async with raw(service) as client:
            client.write(data)
            assert await client.fatal() == sqlstate
        cursor = await other.execute("SELECT key FROM search('d', '[1]', 1)")
        assert await cursor.fetchall() == [("7",)]
