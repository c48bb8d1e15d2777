"""Break syncd on purpose, and see the suite fail: ``python -m tests.oracle.prove_traps [--list | trap ...]``.

``--list`` names the traps, and what of their texts and tests is not there; it breaks nothing. Each trap is a replacement in a copy of the
package, which tests and syncd processes then import. The exit status is 0 when every broken copy failed at least one of its tests, and the copy
that was not broken passed them all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
ORACLE = "tests/oracle/test_oracle.py"
RACES = "tests/faults/test_races.py"
LATE_COMMIT = f"{RACES}::test_a_transaction_that_took_a_lower_outbox_id_and_commits_later_is_noticed[usual poll]"
LOOK = f"{RACES}::test_every_commit_of_a_burst_is_noticed_by_the_look_for_open_writers_alone"
HALF = f"{RACES}::test_readers_never_see_half_of_a_transaction"
FREEING = "tests/faults/test_freeing.py"
PUBLICATIONS = "tests/integration/test_publications.py"
SESSIONS = "tests/faults/test_sessions.py"
ROTATION = "tests/faults/test_rotation.py"
KEYS = "tests/integration/test_keys.py"
STRAY = "tests/integration/test_stray_triggers.py"
LOCKED = "tests/faults/test_locked_outbox.py"
FALLING_BEHIND = "tests/faults/test_falling_behind.py"
LARGE = "tests/faults/test_large_transactions.py"
OUTBOX = "tests/integration/test_outbox.py"
ERRORS = "tests/faults/test_errors.py"
OVERDUE = "tests/integration/test_verify_overdue.py"
NULL_KEYS = "tests/integration/test_null_keys.py"
RENAMES = "tests/faults/test_renames.py"
EXPRESSIONS = "tests/faults/test_expressions.py"
PLACES = "tests/integration/test_places.py"
UNLOGGED = "tests/faults/test_unlogged.py::test_what_a_crash_has_emptied_is_empty_by_itself_soon_after_the_reconnect"
CODES = "tests/unit/index/test_index_codes.py"
SAVED_CODES = "tests/unit/index/test_saved_codes.py"
COMPACTION = "tests/unit/index/test_compaction.py"
CODES_ORACLE = "tests/unit/index/test_index_codes_oracle.py"
QUEUE = "tests/unit/rpc/test_rpc_search_queue.py"
FULL_QUEUE = "tests/faults/test_notification_queue.py"
PROGRESS = "tests/unit/test_progress.py"
FAILED = 1
"""pytest's exit status when tests ran and some failed."""


@dataclass(frozen=True)
class Trap:
    """What is broken, as edits (file, text, replacement), and which tests must notice, each by itself."""

    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


TRAPS = {
    "nothing is broken": Trap((), (ORACLE, LATE_COMMIT, LOOK, HALF)),
    "changes are those with an id above the last one": Trap(
        (
            (
                "syncd/postgres/outbox.py",
                '        if in_progress:\n            yield "read_keys_in',
                '        if False:\n            yield "read_keys_in',
            ),
            (
                "syncd/postgres/outbox.py",
                '{"xmax": snapshot.xmax}',
                '{"xmax": snapshot.xmax, "outbox_id": cursor.position.outbox_id}',
            ),
            (
                "sql/queries/passes.sql",
                "WHERE o.xid >= '{xmax}'::xid8\n  AND o.op = 'k'",
                "WHERE o.id > {outbox_id}\n  AND o.op = 'k'",
            ),
        ),
        (ORACLE, LATE_COMMIT),
    ),
    "the pass reads at READ COMMITTED": Trap(
        (
            (
                "sql/queries/passes.sql",
                "BEGIN ISOLATION LEVEL REPEATABLE READ",
                "BEGIN ISOLATION LEVEL READ COMMITTED",
            ),
        ),
        (HALF,),
    ),
    "nobody looks for open writers before sleeping": Trap(
        (
            (
                "syncd/sync/consumer/consumer.py",
                "frozenset(row[0]) if row else frozenset()",
                "frozenset()",
            ),
        ),
        (LOOK,),
    ),
    "a crash is nothing to look back for": Trap(
        (("syncd/sync/consumer/consumer.py", "followed.return_to_confirmed()", "pass"),), (ORACLE,)
    ),
    "a pass does not lock the outbox before its snapshot": Trap(
        (
            (
                "syncd/sync/consumer/passes.py",
                'begin.append(filled("passes", "lock_outbox"))',
                "pass",
            ),
        ),
        (f"{FREEING}::test_a_pass_under_way_keeps_the_slots_that_its_snapshot_sees",),
    ),
    "the rotation waits for its lock": Trap(
        (
            (
                "sql/schema/0001_rotation.sql",
                "ACCESS EXCLUSIVE MODE NOWAIT",
                "ACCESS EXCLUSIVE MODE",
            ),
        ),
        (f"{FREEING}::test_a_reader_of_the_outbox_delays_rotation_and_nobody_else",),
    ),
    "a writer touches a slot that it does not write to": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT; '",
                "LOCK TABLE syncd.outbox_0 IN ROW EXCLUSIVE MODE NOWAIT; '",
            ),
        ),
        (f"{FREEING}::test_a_writer_has_only_the_slot_open_that_it_writes_to[plain]",),
    ),
    "a writer to a partition touches a slot that it does not write to": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT;',",
                "LOCK TABLE syncd.outbox_0 IN ROW EXCLUSIVE MODE NOWAIT;',",
            ),
        ),
        (f"{FREEING}::test_a_writer_has_only_the_slot_open_that_it_writes_to[partitioned]",),
    ),
    "a writer waits for whoever has locked the outbox": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT; '",
                "LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE; '",
            ),
        ),
        (
            f"{LOCKED}::test_a_write_neither_fails_nor_waits_while_the_outbox_is_locked_and_leaves_a_doubt"
            "[18-statement-lock_timeout = 0-SHARE]",
        ),
    ),
    "a trigger notes whatever table it fires on": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "IF TG_RELID OPERATOR(pg_catalog.<>) %5$s::pg_catalog.oid AND",
                "IF false AND %5$s <> 0 AND",
            ),
        ),
        (
            f"{STRAY}::test_a_trigger_on_another_table_notes_nothing_and_fails_no_write[18-statement-INSERT INTO other VALUES (1, '{{1}}')]",
        ),
    ),
    "a transaction older than the attachment is of no source": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "RETURN NOT EXISTS (SELECT FROM",
                "RETURN EXISTS (SELECT FROM",
            ),
            (
                "sql/triggers/0002_capture.sql",
                "a.source <> relation AND a.source NOT IN",
                "a.source IN",
            ),
        ),
        (f"{STRAY}::test_a_transaction_older_than_the_attachment_is_noted_all_the_same[18]",),
    ),
    "an apply worker is nothing to look for": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "        IF subscribed THEN\n",
                "        IF false THEN\n",
            ),
        ),
        ("tests/tools/test_pglogical.py::test_a_table_that_pglogical_fills_is_followed",),
    ),
    "a doubt is settled while its writer is open": Trap(
        (
            (
                "syncd/sync/consumer/unrecorded.py",
                "holding = frozenset(holders)",
                "holding = frozenset[int]()",
            ),
        ),
        (f"{LOCKED}::test_a_doubted_writer_that_commits_late_is_not_missed",),
    ),
    "a doubt is settled only when no other is open": Trap(
        (
            (
                "syncd/sync/consumer/unrecorded.py",
                "ended = {xid for xid in self.open if snapshot.sees(xid)}",
                "ended = {xid for xid in self.open if all(map(snapshot.sees, self.open))}",
            ),
            (
                "syncd/sync/consumer/unrecorded.py",
                "self.ended |= not self.open <= holding",
                "self.ended |= bool(self.open) and not holding",
            ),
        ),
        (f"{LOCKED}::test_a_doubted_writer_is_found_while_another_one_stays_open",),
    ),
    "a writer waits for a lock on the attachments": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "search_path = pg_catalog, syncd SET lock_timeout = '20ms'\nAS $function$\nBEGIN\n    PERFORM",
                "search_path = pg_catalog, syncd\nAS $function$\nBEGIN\n    --",
            ),
        ),
        (
            "tests/integration/test_partition_capture.py::test_a_write_to_a_partition_does_not_wait_for_a_lock_on_the_attachments[18-deep]",
        ),
    ),
    "a checkpoint forgets the doubts": Trap(
        (
            (
                "syncd/sync/consumer/unrecorded.py",
                "return UNSETTLED if self.open or self.ended or self.unseen else self.seen",
                "return self.seen",
            ),
        ),
        (
            f"{LOCKED}::test_a_doubt_that_was_not_settled_at_the_last_checkpoint_is_settled_after_the_start",
        ),
    ),
    "a start takes the doubts as they are": Trap(
        (
            (
                "syncd/sync/consumer/consumer.py",
                "self.doubts.seen = manifest.doubts",
                "self.doubts.seen = read_doubts(connection)",
            ),
        ),
        (f"{LOCKED}::test_a_doubt_noted_while_no_service_ran_is_settled_at_the_next_start[stop]",),
    ),
    "a time is noted as its writer's session writes it": Trap(
        (
            (
                "sql/schema/0002_keys.sql",
                "pg_catalog.to_json(pg_catalog.timezone('UTC', $1))::pg_catalog.text, '\"') OPERATOR",
                "pg_catalog.to_json($1)::pg_catalog.text, '\"') OPERATOR",
            ),
        ),
        (
            f"{KEYS}::test_the_text_of_a_time_depends_on_no_setting_of_its_writer_and_reads_back[18]",
        ),
    ),
    "a key that cannot be read fails its source": Trap(
        (
            (
                "syncd/sync/consumer/passes.py",
                "        except (ValueError, TypeError) as error:\n",
                "        except ZeroDivisionError as error:\n",
            ),
        ),
        (f"{KEYS}::test_a_key_that_cannot_be_read_has_the_source_read_again[abc]",),
    ),
    "what a checkpoint needs is freed": Trap(
        (
            (
                "sql/schema/0001_rotation.sql",
                "needed_by_someone := newest >= pg_snapshot_xmax(needed.snapshot)",
                "needed_by_someone := false",
            ),
        ),
        (
            f"{FREEING}::test_only_what_every_consumer_has_seen_is_freed",
            f"{ROTATION}::test_two_consumers_at_different_positions_are_right_through_rotations",
        ),
    ),
    "transactions that were open at a checkpoint are forgotten": Trap(
        (("sql/schema/0001_rotation.sql", "IF NOT needed_by_someone THEN", "IF false THEN"),),
        (f"{FREEING}::test_a_transaction_of_which_rows_may_come_holds_back_what_it_wrote",),
    ),
    "what was freed is not noted": Trap(
        (
            (
                "sql/schema/0001_rotation.sql",
                "ELSE syncd.seen_by_either(l.freed, seen) END;",
                "END WHERE false;",
            ),
        ),
        (f"{FALLING_BEHIND}::test_an_older_data_directory_reconciles_after_a_rotation",),
    ),
    "nobody looks at what was freed": Trap(
        (
            (
                "syncd/types.py",
                "return freed is not None and not self.covers(freed)",
                "return False",
            ),
        ),
        (
            f"{FALLING_BEHIND}::test_an_older_data_directory_reconciles_after_a_rotation",
            f"{FALLING_BEHIND}::test_a_live_consumer_that_falls_too_far_behind_rebuilds",
        ),
    ),
    "a start does not apply the cap": Trap(
        (("syncd/sync/consumer/consumer.py", "            apply_cap(connection)\n", ""),),
        (f"{FALLING_BEHIND}::test_where_nothing_ran_the_next_to_start_applies_the_cap",),
    ),
    "a service that is frozen while it reports holds its row": Trap(
        (
            (
                "sql/queries/consumer.sql",
                "SET LOCAL synchronous_commit = off;\nSET LOCAL statement_timeout = '30s';\nSET LOCAL idle_in_transaction_session_timeout = '30s';",
                "SET LOCAL synchronous_commit = off;",
            ),
        ),
        (
            f"{ROTATION}::test_a_service_that_is_frozen_in_a_transaction_keeps_no_lock_for_long[report_limits]",
        ),
    ),
    "what another cluster freed is believed": Trap(
        (("syncd/postgres/identity.py", '    "forget_freed",\n', ""),),
        (f"{FALLING_BEHIND}::test_what_another_cluster_freed_is_forgotten_in_a_restored_copy",),
    ),
    "a checkpoint forgets the window": Trap(
        (
            (
                "syncd/sync/background/checkpoints.py",
                "if cursor.window is None\n        else SavedWindow",
                "if True\n        else SavedWindow",
            ),
        ),
        (f"{LARGE}::test_one_large_transaction_goes_on_where_a_kill_left_it[100000]",),
    ),
    "a table of the schema has no replica identity": Trap(
        (
            (
                "sql/schema/0002_publications.sql",
                "ALTER TABLE %s REPLICA IDENTITY FULL",
                "ALTER TABLE %s REPLICA IDENTITY DEFAULT",
            ),
        ),
        (f"{PUBLICATIONS}::test_under_a_publication_status_quarantine_settings_and_freeing_go_on",),
    ),
    "text comes in the encoding of a role or database": Trap(
        (
            ("syncd/postgres/connection.py", '    "client_encoding": "UTF8",\n', ""),
            ("sql/queries/session.sql", "SET LOCAL client_encoding = 'UTF8';\n", ""),
        ),
        (f"{SESSIONS}::test_a_service_and_every_command_work_under_odd_settings[database-18]",),
    ),
    "a session reads text in the forms that it inherits": Trap(
        (("sql/queries/session.sql", "SET LOCAL datestyle = 'ISO, YMD';\n", ""),),
        (f"{SESSIONS}::test_a_service_and_every_command_work_under_odd_settings[role-18]",),
    ),
    "a primary that is read-only by default is a standby": Trap(
        (
            (
                "syncd/postgres/connection.py",
                '"target_session_attrs": "primary"',
                '"target_session_attrs": "read-write"',
            ),
        ),
        (f"{SESSIONS}::test_a_service_and_every_command_work_under_odd_settings[DSN-18]",),
    ),
    "a time-out ends the listener's rest": Trap(
        (("sql/queries/session.sql", "SET idle_session_timeout = 0;", "SELECT 1;"),),
        (f"{SESSIONS}::test_the_connection_for_reports_and_the_listener_set_it_as_well[role]",),
    ),
    "rules are printed in the forms of attach's session": Trap(
        (("sql/schema/0002_rules.sql", "SET datestyle = 'ISO, YMD' ", ""),),
        (
            f"{SESSIONS}::test_attach_keeps_the_same_rules_whatever_its_session_has_set[18-datestyle]",
        ),
    ),
    "a setting stays in a session that a pooler shares": Trap(
        (
            (
                "syncd/postgres/connection.py",
                "session.settings(connection) if own_forms",
                "session.own_session_settings(connection) if own_forms",
            ),
        ),
        (
            "tests/faults/test_pooler.py::test_no_setting_stays_in_a_session_that_a_pooler_shares[plain]",
        ),
    ),
    "an upgrade waits for its lock": Trap(
        (
            (
                "sql/schema/0002_publications.sql",
                "IN ACCESS EXCLUSIVE MODE NOWAIT;",
                "IN ACCESS EXCLUSIVE MODE;",
            ),
        ),
        (
            f"{PUBLICATIONS}::test_an_upgrade_beside_a_writer_whose_transaction_is_open_keeps_no_other_writer_waiting[18]",
        ),
    ),
    "another server's outbox is believed": Trap(
        (
            (
                "sql/schema/0002_publications.sql",
                "c.relname <> 'embeddings' ORDER BY 1",
                "false ORDER BY 1",
            ),
        ),
        (
            f"{PUBLICATIONS}::test_a_database_that_gets_another_servers_outbox_is_not_followed_until_it_does_not[18]",
        ),
    ),
    "the planner may sort a page": Trap(
        (
            (
                "sql/queries/session.sql",
                "SET LOCAL enable_seqscan = off;\nSET LOCAL enable_sort = off;",
                "SET LOCAL enable_seqscan = off;",
            ),
        ),
        (
            f"{OUTBOX}::test_a_page_of_one_large_transaction_is_read_by_its_index_in_every_slot[False]",
        ),
    ),
    "the registry is gone through without a copy": Trap(
        (
            (
                "syncd/sync/registry/datasets.py",
                "return list(self.by_name.values())",
                "return self.by_name.values()",
            ),
        ),
        ("tests/unit/test_registry.py",),
    ),
    "a background task's error ends the service": Trap(
        (
            (
                "syncd/supervision.py",
                "                if not has_started():\n",
                "                if True:\n",
            ),
        ),
        (f"{ERRORS}::test_a_task_that_fails_is_told_of_and_started_again[builder]",),
    ),
    "an error of one source ends the pass": Trap(
        (
            (
                "syncd/sync/consumer/passes.py",
                "            if not self.is_of_source(each, error):\n",
                "            if True:\n",
            ),
        ),
        (
            f"{ERRORS}::test_an_unexpected_error_fails_its_source_and_the_others_go_on[syncd.sync.consumer.passes:apply]",
        ),
    ),
    "a verify that never ends is not told of": Trap(
        (
            (
                "syncd/sync/background/overdue.py",
                "    if not interval_seconds or not late:\n",
                "    if True:\n",
            ),
        ),
        (
            f"{OVERDUE}::test_a_whole_verify_that_is_late_is_told_by_check_the_page_and_status_with_the_reason",
        ),
    ),
    "one table's trouble keeps others from being verified": Trap(
        (
            (
                "syncd/sync/background/verify.py",
                "            if len(ids) == 1 and only is not None:\n",
                "            if True:\n",
            ),
        ),
        (
            f"{OVERDUE}::test_whoever_waits_for_a_lock_on_one_table_keeps_no_other_from_being_verified",
        ),
    ),
    "a NULL is a key": Trap(
        (("syncd/postgres/outbox.py", "            if key is None:\n", "            if False:\n"),),
        (
            f"{NULL_KEYS}::test_a_row_whose_key_is_null_is_in_quarantine_and_the_others_go_on[while it runs-text]",
        ),
    ),
    "a rule keeps the names that it was attached with": Trap(
        (
            (
                "sql/schema/0002_rules.sql",
                "r.source = a.id AND r.compiled AND",
                "r.source = a.id AND false AND",
            ),
        ),
        (
            f"{RENAMES}::test_rules_follow_what_they_name_when_it_is_renamed_or_moved[True-an enum's value]",
        ),
    ),
    "nobody looks at the values of enum types": Trap(
        (("syncd/postgres/catalogue.py", "if labels.get(number, label) != label:", "if False:"),),
        (f"{RENAMES}::test_a_renamed_value_is_what_a_search_filters_on",),
    ),
    "an error of the rule's counts as the row's": Trap(
        (
            (
                "syncd/sync/source/reading.py",
                "    check_rules(connection, source)\n    found, failing = halving",
                "    found, failing = halving",
            ),
        ),
        (
            f"{RENAMES}::test_a_value_that_the_rule_names_by_an_old_name_fails_the_source_and_no_row_leaves",
        ),
    ),
    "a rule that fails on every row has the rows leave": Trap(
        (("syncd/sync/source/reading.py", "    if others and all(", "    if False and all("),),
        (
            f"{EXPRESSIONS}::test_a_function_that_fails_on_every_row_fails_the_source_and_no_row_leaves",
        ),
    ),
    "attach compares text alone": Trap(
        (
            (
                "sql/schema/0002_attach.sql",
                "(old.project, old.dataset, old.live) OPERATOR(pg_catalog.=) (compiled_project, compiled_dataset, compiled_live)",
                "old.arguments = given",
            ),
        ),
        (
            "tests/integration/test_rules.py::test_the_same_text_is_attached_again_where_it_means_something_else_now[18]",
        ),
    ),
    "nobody looks whether tables have changed places": Trap(
        (("syncd/ops/check_sources.py", "    yield from check_place(look, source)\n", ""),),
        (
            f"{PLACES}::test_two_tables_that_swapped_names_are_told_and_each_dataset_is_its_tables_again[False]",
        ),
    ),
    "a dropped table's name is forgotten": Trap(
        (
            (
                "sql/schema/0002_attach.sql",
                "           n.nspname, r.relname, n.nspname, r.relname,",
                "           NULL, NULL, NULL, NULL,",
            ),
        ),
        ("tests/integration/test_rules.py::test_a_table_made_again_is_attached_like_before[18]",),
    ),
    "a crash is not known to empty what is unlogged": Trap(
        (("syncd/sync/source/followed.py", "self.catalogue.facts.unlogged:", "False:"),),
        (f"{UNLOGGED}[True-items]", f"{UNLOGGED}[False-items_1]"),
    ),
    "dead rows are candidates": Trap(
        (
            (
                "syncd/index/codes/codes.py",
                "SearchParametersIVF(sel=self._selector, nprobe",
                "SearchParametersIVF(nprobe",
            ),
        ),
        (CODES_ORACLE,),
    ),
    "rows without codes are not searched": Trap(
        (("syncd/index/search/approximate.py", "if codes.codes.stop < view.count", "if False"),),
        (CODES_ORACLE,),
    ),
    "a compaction does not see who died meanwhile": Trap(
        (
            (
                "syncd/index/generation/compaction.py",
                "if view.live.bits is before.live.bits:",
                "if True:",
            ),
        ),
        (CODES_ORACLE,),
    ),
    "a change may come in the last moment of a compaction": Trap(
        (
            (
                "syncd/index/dataset.py",
                "with self._write_lock:\n            return self._apply",
                "if True:\n            return self._apply",
            ),
        ),
        (f"{COMPACTION}::test_a_change_in_the_last_moment_of_a_compaction_waits_for_it",),
    ),
    "a sweep forgets what it saw before a compaction": Trap(
        (("syncd/index/dataset.py", "self._seen = move.seen(self._seen)", "pass"),),
        (f"{COMPACTION}::test_a_sweep_goes_on_in_the_new_generation",),
    ),
    "a compaction copies what it did not check": Trap(
        (("syncd/index/dataset.py", "source.generation.scrub(stop)", "pass"),),
        (f"{COMPACTION}::test_damage_that_nobody_has_noticed_is_not_copied",),
    ),
    "a filter's rows are taken from whatever the codes find": Trap(
        (
            (
                "syncd/index/search/approximate.py",
                "enough = places.size >= wanted and places[wanted - 1] < point.k",
                "enough = True",
            ),
        ),
        (f"{CODES}::test_unselective_filters_use_the_codes_and_reach_the_recall",),
    ),
    "recall is measured against what rounding has left": Trap(
        (("syncd/index/build/neighbors.py", "(farthest**2 <= left_out**2 - error)", "True"),),
        ("tests/unit/index/test_index_neighbors.py",),
    ),
    "rows of another chunk are taken": Trap(
        (
            (
                "syncd/index/storage/window.py",
                "self._bases[rows >> self._shift] +",
                "self._bases[0] +",
            ),
        ),
        ("tests/unit/index/test_index_files.py",),
    ),
    "a longer search never leaves the event loop": Trap(
        (("syncd/rpc/in_place.py", "and now >= self._company_until", ""),),
        ("tests/unit/rpc/test_rpc_in_place.py",),
    ),
    "joined codes lack some": Trap(
        (
            (
                "syncd/index/build/joining.py",
                "return slots[alive], codes[alive]",
                "return slots[alive][1:], codes[alive][1:]",
            ),
        ),
        (f"{CODES}::test_joined_codes_are_those_that_encoding_all_rows_would_give[False-l2]",),
    ),
    "what was measured in haste is never measured well": Trap(
        (("syncd/index/build/plan.py", "if not measured.whole:", "if False:"),),
        (f"{CODES}::test_new_codes_serve_the_ten_nearest_at_once_and_more_when_that_is_measured",),
    ),
    "recall is measured all the time": Trap(
        (("syncd/sync/background/builder.py", "and grows\n", "and False\n"),),
        (
            "tests/unit/test_builder.py::test_recall_is_measured_again_when_rows_have_stopped_coming",
        ),
    ),
    "codes of rows that are gone are used": Trap(
        (("syncd/index/dataset.py", "if not same_rows or state.codes", "if state.codes"),),
        (f"{CODES}::test_codes_of_rows_that_were_cleared_meanwhile_are_not_used",),
    ),
    "new codes take the names of saved ones": Trap(
        (
            (
                "syncd/index/dataset.py",
                "index._code_number = saved.code_number",
                "index._code_number = 0",
            ),
        ),
        (f"{SAVED_CODES}::test_new_codes_never_overwrite_those_of_a_checkpoint_that_is_kept",),
    ),
    "damaged codes are served": Trap(
        (
            (
                "syncd/index/codes/files.py",
                "memoryview(read_file(directory / name, files[name]))",
                "memoryview((directory / name).read_bytes())",
            ),
        ),
        (
            f"{SAVED_CODES}::test_damaged_codes_are_built_again_from_the_vectors_and_searches_are_exact_meanwhile[changed-part]",
        ),
    ),
    "the luckiest settings are chosen": Trap(
        (
            (
                "syncd/index/codes/calibration.py",
                "return min(self.bound, self.recall)",
                "return self.recall + 0.02",
            ),
        ),
        (f"{CODES}::test_the_recall_of_other_rows_is_at_or_above_each_target",),
    ),
    "searches that wait do not go together": Trap(
        (("syncd/rpc/search_queue.py", "if common is None or", "if True or"),),
        (f"{QUEUE}::test_those_that_wait_go_together_once_a_thread_is_free",),
    ),
    "a search that leaves takes its turn with it": Trap(
        (
            (
                "syncd/rpc/search_queue.py",
                "                self._cost -= mine.cost\n                self._next_turn()",
                "                pass",
            ),
        ),
        (f"{QUEUE}::test_one_who_goes_in_the_moment_its_turn_comes_passes_it_on",),
    ),
    "a writer notifies into a full queue": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "\n                          AND pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) 0.5::pg_catalog.float8",
                "",
            ),
        ),
        (f"{FULL_QUEUE}::test_a_write_succeeds_while_the_notification_queue_is_full_and_is_found",),
    ),
    "a writer row by row notifies into a full queue": Trap(
        (
            (
                "sql/triggers/0002_capture.sql",
                "\n                      AND pg_catalog.pg_notification_queue_usage() OPERATOR(pg_catalog.<) 0.5::pg_catalog.float8",
                "",
            ),
        ),
        (f"{FULL_QUEUE}::test_a_write_succeeds_while_the_notification_queue_is_full_and_is_found",),
    ),
    "attach notifies into a full queue": Trap(
        (("sql/triggers/0002_wake.sql", "pg_notification_queue_usage() < 0.5", "true"),),
        (
            f"{FULL_QUEUE}::test_init_attach_detach_and_a_damaged_outbox_do_not_notify_into_a_full_queue",
        ),
    ),
    "a lost database is an error of the task that meets it first": Trap(
        (
            (
                "syncd/sync/consumer/progress.py",
                "elif self.connected and isinstance(error, DatabaseUnreachable):",
                "elif False:",
            ),
        ),
        (f"{PROGRESS}::test_a_task_does_not_fail_if_the_consumer_loses_the_database_as_well",),
    ),
}


def misplaced(trap: Trap) -> list[str]:
    """The edits whose text is not in its file exactly once."""
    texts = [
        (name, text, (CHECKOUT / name).read_text("utf-8").count(text))
        for name, text, _ in trap.edits
    ]
    return [f"{name} has {text!r} {found} times" for name, text, found in texts if found != 1]


def missing_tests() -> list[str]:
    """What pytest says of tests that traps name and that are not there."""
    tests = sorted({test for trap in TRAPS.values() for test in trap.tests})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if line] if done.returncode else []


def copy_package(folder: Path, trap: Trap) -> None:
    """The package as it is installed, broken; raises ``ValueError`` where it cannot be broken as it is meant to be."""
    if faults := misplaced(trap):
        raise ValueError("; ".join(faults))
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "syncd", folder / "syncd", ignore=ignore)
    for part in ("sql", "migrations"):
        shutil.copytree(CHECKOUT / part, folder / "syncd" / part, ignore=ignore, dirs_exist_ok=True)
    shutil.copytree(
        CHECKOUT / "tests", folder / "tests", ignore=ignore
    )  # pytest imports from where the tests are
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    for name, text, replacement in trap.edits:
        path = folder / (name if name.startswith("syncd/") else f"syncd/{name}")
        path.write_text(path.read_text("utf-8").replace(text, replacement), "utf-8")


def run(trap: Trap) -> bool:
    """Whether the trap's tests notice it, or pass where nothing is broken."""
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        checkout, data = Path(folder) / "checkout", CHECKOUT.parent / "shared"
        copy_package(checkout, trap)
        if data.is_dir():  # real vectors, beside a checkout where there are any
            (Path(folder) / "shared").symlink_to(data)
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        for test in trap.tests:
            begun = time.monotonic()
            command = [
                sys.executable,
                "-m",
                "pytest",
                test,
                "-q",
                "-x",
                "-n",
                "0",
                "-p",
                "no:cacheprovider",
            ]  # with processes, -x exits 2
            done = subprocess.run(
                command,
                env=environment,
                cwd=checkout,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            as_meant = done.returncode == (FAILED if trap.edits else 0)
            fine &= as_meant
            verdict = (
                "fails"
                if done.returncode == FAILED
                else "passes"
                if done.returncode == 0
                else "did not run"
            )
            print(
                f"  {'ok  ' if as_meant else 'WRONG'} {test} {verdict} after {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            errors = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
            print(
                "".join(f"       {line[4:].strip()[:150]}\n" for line in errors[:1]),
                end="",
                flush=True,
            )
    return fine


def main() -> int:
    """All traps, or those that are named."""
    if sys.argv[1:] == ["--list"]:
        for name, trap in TRAPS.items():
            print("\n  WRONG ".join([name, *misplaced(trap)]))
        missing = missing_tests()
        print("".join(f"WRONG {line}\n" for line in missing), end="")
        return 1 if missing or any(misplaced(trap) for trap in TRAPS.values()) else 0
    results = []
    for name in sys.argv[1:] or TRAPS:
        print(name, flush=True)
        results.append(run(TRAPS[name]))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
