"""Traps in the SQL that runs in the database: capture triggers, rotation, attachment rules."""

from __future__ import annotations

from tests.oracle.traps.trap import Edit, Trap, broken

FREEING = "tests/faults/test_freeing.py"
PUBLICATIONS = "tests/integration/test_publications.py"
SESSIONS = "tests/faults/test_sessions.py"
ROTATION = "tests/faults/test_rotation.py"
KEYS = "tests/integration/test_keys.py"
STRAY = "tests/integration/test_stray_triggers.py"
LOCKED = "tests/faults/test_locked_outbox.py"
FALLING_BEHIND = "tests/faults/test_falling_behind.py"
RENAMES = "tests/faults/test_renames.py"
FULL_QUEUE = "tests/faults/test_notification_queue.py"

DATABASE_TRAPS: dict[str, Trap] = {
    "the rotation waits for its lock": broken(
        "sql/schema/0001_rotation.sql",
        "ACCESS EXCLUSIVE MODE NOWAIT",
        "ACCESS EXCLUSIVE MODE",
        f"{FREEING}::test_a_reader_of_the_outbox_delays_rotation_and_no_writer",
    ),
    "a writer touches a slot that it does not write to": broken(
        "sql/triggers/0002_capture.sql",
        "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT; '",
        "LOCK TABLE syncd.outbox_0 IN ROW EXCLUSIVE MODE NOWAIT; '",
        f"{FREEING}::test_a_writer_has_only_the_slot_open_that_it_writes_to[plain]",
    ),
    "a writer to a partition touches a slot that it does not write to": broken(
        "sql/triggers/0002_capture.sql",
        "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT;',",
        "LOCK TABLE syncd.outbox_0 IN ROW EXCLUSIVE MODE NOWAIT;',",
        f"{FREEING}::test_a_writer_has_only_the_slot_open_that_it_writes_to[partitioned]",
    ),
    "a writer waits for a lock on the outbox": broken(
        "sql/triggers/0002_capture.sql",
        "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT; '",
        "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE; '",
        f"{LOCKED}::"
        "test_a_write_neither_fails_nor_waits_while_the_outbox_is_locked_and_leaves_a_doubt"
        "[18-statement-SHARE]",
    ),
    "a trigger notes any table that it fires on": broken(
        "sql/triggers/0002_capture.sql",
        "IF TG_RELID OPERATOR(pg_catalog.<>) %5$s::pg_catalog.oid\n",
        "IF false AND %5$s <> 0\n",
        f"{STRAY}::"
        "test_a_trigger_on_another_table_notes_nothing_and_fails_no_write"
        "[18-statement-INSERT INTO other VALUES (1, '{1}')]",
    ),
    "a transaction older than the attachment belongs to no source": Trap(
        edits=(
            Edit(
                "sql/triggers/0002_capture.sql",
                "RETURN NOT EXISTS (SELECT FROM",
                "RETURN EXISTS (SELECT FROM",
            ),
            Edit(
                "sql/triggers/0002_capture.sql",
                "a.source <> relation\n                         AND a.source NOT IN",
                "a.source IN",
            ),
        ),
        tests=(f"{STRAY}::test_a_transaction_older_than_the_attachment_is_noted_all_the_same[18]",),
    ),
    "an apply worker is not looked for": broken(
        "sql/triggers/0002_capture.sql",
        "        IF subscribed THEN\n",
        "        IF false THEN\n",
        "tests/tools/test_pglogical.py::test_a_table_that_pglogical_fills_is_followed",
    ),
    "a writer waits for a lock on the attachments": broken(
        "sql/triggers/0002_capture.sql",
        "search_path = pg_catalog, syncd SET lock_timeout = '20ms'\nAS $function$\nBEGIN\n    "
        "PERFORM",
        "search_path = pg_catalog, syncd\nAS $function$\nBEGIN\n    --",
        "tests/integration/test_partition_capture.py::"
        "test_a_write_to_a_partition_does_not_wait_for_a_lock_on_the_attachments[18-deep]",
    ),
    "a time is noted as its writer's session writes it": broken(
        "sql/schema/0002_keys.sql",
        "pg_catalog.to_json(pg_catalog.timezone('UTC', $1))::pg_catalog.text, '\"')\n"
        "                    OPERATOR",
        "pg_catalog.to_json($1)::pg_catalog.text, '\"')\n                    OPERATOR",
        f"{KEYS}::test_the_text_of_a_time_depends_on_no_setting_of_its_writer_and_reads_back[18]",
    ),
    "rows that a checkpoint needs are freed": broken(
        "sql/schema/0001_rotation.sql",
        "needed_by_someone := newest >= pg_snapshot_xmax(needed.snapshot)",
        "needed_by_someone := false",
        f"{FREEING}::test_only_rows_that_every_consumer_has_seen_are_freed",
        f"{ROTATION}::test_two_consumers_at_different_positions_are_right_through_rotations",
    ),
    "transactions that were open at a checkpoint are forgotten": broken(
        "sql/schema/0001_rotation.sql",
        "IF NOT needed_by_someone THEN",
        "IF false THEN",
        f"{FREEING}::test_an_open_transaction_that_has_written_holds_its_rows_back",
    ),
    "freed transactions are not noted": broken(
        "sql/schema/0001_rotation.sql",
        "ELSE syncd.seen_by_either(l.freed, seen) END;",
        "END WHERE false;",
        f"{FALLING_BEHIND}::test_an_older_data_directory_reconciles_after_a_rotation",
    ),
    "a table of the schema has no replica identity": broken(
        "sql/schema/0002_publications.sql",
        "ALTER TABLE %s REPLICA IDENTITY FULL",
        "ALTER TABLE %s REPLICA IDENTITY DEFAULT",
        f"{PUBLICATIONS}::test_under_a_publication_status_quarantine_settings_and_freeing_go_on",
    ),
    "rules are printed in the forms of attach's session": broken(
        "sql/schema/0002_rules.sql",
        "SET datestyle = 'ISO, YMD' ",
        "",
        f"{SESSIONS}::test_attach_keeps_the_same_rules_whatever_its_session_has_set[18-datestyle]",
    ),
    "an upgrade waits for its lock": broken(
        "sql/schema/0002_publications.sql",
        "IN ACCESS EXCLUSIVE MODE NOWAIT;",
        "IN ACCESS EXCLUSIVE MODE;",
        f"{PUBLICATIONS}::"
        "test_an_upgrade_alongside_an_open_writer_keeps_no_other_writer_waiting"
        "[18]",
    ),
    "another server's outbox is believed": broken(
        "sql/schema/0002_publications.sql",
        "AND c.relname <> 'embeddings'\n",
        "AND false\n",
        f"{PUBLICATIONS}::"
        "test_a_database_that_gets_another_servers_outbox_is_not_followed_until_it_does_not[18]",
    ),
    "a rule keeps the names that it was attached with": broken(
        "sql/schema/0002_rules.sql",
        "r.source = a.id AND r.compiled\n",
        "r.source = a.id AND false\n",
        f"{RENAMES}::test_rules_follow_an_object_that_is_renamed_or_moved[True-an enum's value]",
    ),
    "attach compares text alone": broken(
        "sql/schema/0002_attach.sql",
        "(old.project, old.dataset, old.live)\n"
        "           OPERATOR(pg_catalog.=) (compiled_project, compiled_dataset, compiled_live)",
        "old.arguments = given",
        "tests/integration/test_rules.py::"
        "test_the_same_text_makes_a_new_attachment_if_its_meaning_has_changed[18]",
    ),
    "a dropped table's name is forgotten": broken(
        "sql/schema/0002_attach.sql",
        "           n.nspname, r.relname, n.nspname, r.relname,",
        "           NULL, NULL, NULL, NULL,",
        "tests/integration/test_rules.py::test_a_table_made_again_is_attached_like_before[18]",
    ),
    "a writer notifies into a full queue": broken(
        "sql/triggers/0002_capture.sql",
        "\n                          AND pg_catalog.pg_notification_queue_usage()\n"
        "                              OPERATOR(pg_catalog.<) 0.5::pg_catalog.float8",
        "",
        f"{FULL_QUEUE}::test_a_write_succeeds_while_the_notification_queue_is_full_and_is_found",
    ),
    "a writer row by row notifies into a full queue": broken(
        "sql/triggers/0002_capture.sql",
        "\n                      AND pg_catalog.pg_notification_queue_usage()\n"
        "                          OPERATOR(pg_catalog.<) 0.5::pg_catalog.float8",
        "",
        f"{FULL_QUEUE}::test_a_write_succeeds_while_the_notification_queue_is_full_and_is_found",
    ),
    "attach notifies into a full queue": broken(
        "sql/triggers/0002_wake.sql",
        "pg_notification_queue_usage() < 0.5",
        "true",
        f"{FULL_QUEUE}::"
        "test_init_attach_detach_and_a_damaged_outbox_do_not_notify_into_a_full_queue",
    ),
}
