"""The consumer's start on a connection: its checks, its name, and what the indexes are worth.

Invariant: after each connect it is checked that this is the database of the indexes. If that is in
doubt, every row is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from syncd.postgres import session
from syncd.postgres.batch import Kept, PreparingConnection
from syncd.postgres.connection import translated_errors
from syncd.postgres.freeing import apply_cap
from syncd.postgres.identity import (
    Nonce,
    check_server,
    has_nonce,
    keep_name,
    notifies,
    read_bucket_probe,
    read_doubts,
    read_fingerprint_probe,
    read_incarnation,
    read_registry,
    refuse_foreign_rows,
    take_name,
)
from syncd.postgres.schema import store_settings
from syncd.postgres.source import Source
from syncd.store.manifest import Manifest
from syncd.sync.consumer.ahead import Prepared
from syncd.sync.consumer.attached import follow_attached, load_sources, resume_sources
from syncd.sync.consumer.pace import Pace
from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session
from syncd.sync.consumer.transaction import session_settings
from syncd.sync.registry.datasets import Registry
from syncd.types import Position, Snapshot


class Connecting(Progress):
    """The part of a consumer that begins to follow on a new connection."""

    def __init__(self, session: Session, registry: Registry, manifest: Manifest | None) -> None:
        super().__init__(registry)
        self.session = session
        self.manifest = manifest
        self.prepared = Prepared()

    def begin(self, connection: PreparingConnection, first: bool) -> None:
        """Check after each connect that this is the database of the indexes.

        If in doubt, everything is compared with it.
        """
        with translated_errors(self.session.conninfo):
            self.take_up(connection, first)

    def take_up(self, connection: PreparingConnection, first: bool) -> None:
        """``begin``, with psycopg's own errors."""
        self.pace = Pace()  # a new connection does not hold the guard
        self.prepared = Prepared()
        self.doubts.connected = True
        in_transaction = partial(session.transaction, connection, "service_settings")
        with in_transaction():
            prepared_transactions = check_server(connection)
        incarnation = read_incarnation(connection)
        refuse_foreign_rows(connection)
        must_rebuild = False
        if first:
            with in_transaction():
                store_settings(connection, self.session.settings)
            apply_cap(connection)
            must_rebuild, self.session.name_since = take_name(
                connection, self.session.settings, self.session.run_id, self.session.address
            )
        elif self.session.name_since is not None:
            with in_transaction():
                keep_name(
                    connection,
                    self.session.settings,
                    self.session.run_id,
                    self.session.name_since,
                    self.session.address,
                )
        with in_transaction():
            self.session.notifies = notifies(connection, prepared_transactions)
        if self.session.notifies:  # the connection is ours alone
            connection.execute(session_settings(connection))
            connection.kept = Kept()
        position, sources, freed = read_registry(connection, self.session.shard)
        with in_transaction():
            probes = self.session.fingerprint_probe, self.session.bucket_probe
            self.session.fingerprint_probe = read_fingerprint_probe(connection)
            self.session.bucket_probe = read_bucket_probe(connection)
            if first:
                self.load(connection, incarnation, position, sources, freed, must_rebuild)
            else:
                trusted = (
                    probes == (self.session.fingerprint_probe, self.session.bucket_probe)
                    and incarnation == self.session.incarnation
                    and self.session.nonce is not None
                    and has_nonce(connection, self.session.nonce)
                )
                resume_sources(self.sources.values(), position, trusted=trusted)
                follow_attached(self, sources, position)
        self.session.incarnation = incarnation
        self.position = position
        self.publish()

    def load(
        self,
        connection: PreparingConnection,
        incarnation: str,
        position: Position,
        sources: Sequence[Source],
        freed: Snapshot | None,
        must_rebuild: bool,
    ) -> None:
        """Take over the trusted part of the checkpoint; the rest is read from PostgreSQL."""
        manifest, doubt = self.manifest, "there is no checkpoint"
        if manifest is not None:
            nonce = Nonce(manifest.nonce, manifest.nonce_xid)
            if manifest.incarnation != incarnation or manifest.consumer != self.session.consumer:
                doubt = "the checkpoint was made with another database or consumer"
            elif manifest.fingerprint_probe != self.session.fingerprint_probe:
                doubt = "this server computes other fingerprints"
            elif not self.shard_is_the_same(manifest):
                doubt = "this server gives keys other buckets"
            elif not has_nonce(connection, nonce):
                doubt = "the database does not hold the checkpoint's nonce"
            else:
                doubt, self.session.nonce = "", nonce
        if manifest is not None and not doubt:
            self.doubts.seen = manifest.doubts
        else:  # all is read: the first pass reads the holders of the sequence's lock before a row
            self.doubts.seen = read_doubts(connection)
        self.sources = load_sources(
            self.registry,
            sources,
            manifest.sources if manifest is not None else (),
            position,
            doubt=doubt,
            freed=freed,
            must_rebuild=must_rebuild,
        )

    def shard_is_the_same(self, manifest: Manifest) -> bool:
        """Whether a checkpoint's shard has the same keys now. The whole has every key."""
        return self.session.shard.is_whole or manifest.bucket_probe == self.session.bucket_probe
