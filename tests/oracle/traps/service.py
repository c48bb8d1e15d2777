"""Traps in the service: passes, positions, sessions, sources and background tasks."""

from __future__ import annotations

from tests.oracle.traps.trap import Edit, Trap, broken

ORACLE = (
    "tests/oracle/test_oracle.py::"
    "test_every_index_equals_its_table_after_any_sequence_of_writes_and_faults"
)
RACES = "tests/faults/test_races.py"
LATE_COMMIT = (
    f"{RACES}::"
    "test_a_transaction_that_took_a_lower_outbox_id_and_commits_later_is_noticed[usual poll]"
)
OPEN_WRITERS = (
    f"{RACES}::test_every_commit_of_a_burst_is_noticed_by_the_look_for_open_writers_alone"
)
SNAPSHOT = f"{RACES}::test_readers_never_see_half_of_a_transaction"
FREEING = "tests/faults/test_freeing.py"
SESSIONS = "tests/faults/test_sessions.py"
ROTATION = "tests/faults/test_rotation.py"
KEYS = "tests/integration/test_keys.py"
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
UNLOGGED = (
    "tests/faults/test_unlogged.py::"
    "test_a_table_that_a_crash_has_emptied_has_an_empty_index_soon_after_the_reconnect"
)
FIRST_MESSAGE = "tests/integration/test_first_message.py"
MARKS = "tests/integration/test_marks.py"
TRIGGERS = "tests/faults/test_triggers_and_rights.py"
PROGRESS = "tests/unit/test_progress.py"

SERVICE_TRAPS: dict[str, Trap] = {
    "changes are those with an id above the last one": Trap(
        edits=(
            Edit(
                "syncd/postgres/outbox.py",
                '        if snapshot.in_progress:\n            yield "read_keys_in',
                '        if False:\n            yield "read_keys_in',
            ),
            Edit(
                "syncd/postgres/outbox.py",
                'yield "read_keys_begun_since", [xmax]',
                'yield "read_keys_begun_since", [str(cursor.position.outbox_id)]',
            ),
            Edit(
                "sql/queries/passes.sql",
                "WHERE o.xid >= %s::xid8\n  AND (o.op <> 'k'",
                "WHERE o.id > %s::bigint\n  AND (o.op <> 'k'",
            ),
        ),
        tests=(
            ORACLE,
            LATE_COMMIT,
        ),
    ),
    "the pass reads at READ COMMITTED": broken(
        "sql/queries/passes.sql",
        "BEGIN ISOLATION LEVEL REPEATABLE READ",
        "BEGIN ISOLATION LEVEL READ COMMITTED",
        SNAPSHOT,
    ),
    "open writers are not looked for before sleeping": broken(
        "syncd/sync/consumer/consumer.py",
        "if not self.pace.open and not self.pace.unsettled:",
        "if True:",
        OPEN_WRITERS,
    ),
    "a snapshot is believed to name every open transaction": broken(
        "syncd/sync/consumer/pace.py",
        "self.unsettled |= not all_seen",
        "self.unsettled = False",
        f"{RACES}::test_every_commit_of_a_burst_is_noticed_though_a_fifth_rolls_back",
    ),
    "the position is kept after a crash": broken(
        "syncd/sync/consumer/attached.py",
        "each.return_to_confirmed()",
        "pass",
        ORACLE,
    ),
    "the first message is believed to have read every changed row": broken(
        "syncd/sync/consumer/ahead.py",
        "sum(page.rows for page in pages) <= GUESSED_KEYS",
        "True",
        f"{FIRST_MESSAGE}::test_a_pass_that_meets_more_than_that_begins_again[101 rows]",
    ),
    "the first message ends the pass although there are markers": broken(
        "syncd/sync/consumer/ahead.py",
        "and not any(page.marked for page in pages)",
        "and True",
        f"{FIRST_MESSAGE}::test_markers_that_the_snapshot_does_not_see_are_left_to_the_next_pass",
    ),
    "the first message ends the pass although a transaction was open": broken(
        "syncd/sync/consumer/ahead.py",
        "or each.cursor.position.snapshot.in_progress",
        "or False",
        f"{FIRST_MESSAGE}::test_after_an_open_transaction_the_keys_are_read_first",
    ),
    "the first message ends the pass although the catalogue has changed": broken(
        "syncd/sync/consumer/ahead.py",
        "== (each.catalogue.seen, each.catalogue.mark)",
        "is not None",
        f"{FIRST_MESSAGE}"
        "::test_a_table_that_is_rewritten_after_a_pass_with_changed_facts_is_compared",
    ),
    "facts of the catalogue are read every few seconds only": broken(
        "syncd/sync/source/looking.py",
        'return text != known.seen or known.mark not in ("", mark)',
        "return text != known.seen",
        f"{TRIGGERS}::test_rows_written_while_a_trigger_was_off_within_one_transaction_are_found",
    ),
    "a mark does not show triggers": broken(
        "sql/queries/passes.sql",
        "WHERE t.tgrelid = r.oid ORDER BY t.tgname",
        "WHERE false",
        MARKS,
    ),
    "a mark does not show columns": broken(
        "sql/queries/passes.sql",
        "WHERE t.attrelid = r.oid AND t.attnum > 0 ORDER BY t.attnum",
        "WHERE false",
        MARKS,
    ),
    "a statement that was deallocated ends the connection": broken(
        "syncd/sync/consumer/passes.py",
        "            except pg.InvalidSqlStatementName:",
        "            except ZeroDivisionError:",
        "tests/integration/test_batch.py::test_a_pass_goes_on_if_its_statements_were_deallocated",
    ),
    "a statement counts as prepared once it was sent": broken(
        "syncd/postgres/batch.py",
        'name = fresh[query.text] = b"',
        'name = fresh[query.text] = kept.names[query.text] = b"',
        "tests/integration/test_batch.py::"
        "test_after_an_error_the_session_goes_on_with_what_was_prepared",
    ),
    "a pass does not lock the outbox before its snapshot": broken(
        "syncd/sync/consumer/transaction.py",
        'begin.append(filled("passes", "lock_outbox"))',
        "pass",
        f"{FREEING}::test_a_pass_under_way_keeps_the_slots_that_its_snapshot_sees[one by one]",
    ),
    "a batch does not lock the outbox before its snapshot": broken(
        "syncd/sync/consumer/passes.py",
        "first = [BEGIN, self.prepared.lock_of(wanted)]",
        "first = [BEGIN]",
        f"{FREEING}::test_a_pass_under_way_keeps_the_slots_that_its_snapshot_sees[in a batch]",
    ),
    "a doubt is settled while its writer is open": broken(
        "syncd/sync/consumer/unrecorded.py",
        "holding = frozenset(holders)",
        "holding = frozenset[int]()",
        f"{LOCKED}::test_a_doubted_writer_that_commits_late_is_not_missed",
    ),
    "a doubt is settled only when no other is open": Trap(
        edits=(
            Edit(
                "syncd/sync/consumer/unrecorded.py",
                "ended = {xid for xid in self.open if snapshot.sees(xid)}",
                "ended = {xid for xid in self.open if all(map(snapshot.sees, self.open))}",
            ),
            Edit(
                "syncd/sync/consumer/unrecorded.py",
                "self.ended |= not self.open <= holding",
                "self.ended |= bool(self.open) and not holding",
            ),
        ),
        tests=(f"{LOCKED}::test_a_doubted_writer_is_found_while_another_one_stays_open",),
    ),
    "a checkpoint forgets the doubts": broken(
        "syncd/sync/consumer/unrecorded.py",
        "return UNSETTLED if self.due or self.ended else self.seen",
        "return self.seen",
        f"{LOCKED}::"
        "test_a_doubt_that_was_not_settled_at_the_last_checkpoint_is_settled_after_the_start",
    ),
    "a start takes the doubts as they are": broken(
        "syncd/sync/consumer/connecting.py",
        "self.doubts.seen = manifest.doubts",
        "self.doubts.seen = read_doubts(connection)",
        f"{LOCKED}::test_a_doubt_noted_while_no_service_ran_is_settled_at_the_next_start[stop]",
    ),
    "a key that cannot be read fails its source": broken(
        "syncd/sync/consumer/bringing.py",
        "    except (ValueError, TypeError) as error:\n",
        "    except ZeroDivisionError as error:\n",
        f"{KEYS}::test_a_key_that_cannot_be_read_has_the_source_read_again[abc]",
    ),
    "freed transactions are not compared with the position": broken(
        "syncd/types.py",
        "return freed is not None and not self.covers(freed)",
        "return False",
        f"{FALLING_BEHIND}::test_an_older_data_directory_reconciles_after_a_rotation",
        f"{FALLING_BEHIND}::test_a_live_consumer_that_falls_too_far_behind_rebuilds",
    ),
    "a start does not apply the cap": broken(
        "syncd/sync/consumer/connecting.py",
        "            apply_cap(connection)\n",
        "",
        f"{FALLING_BEHIND}::test_after_a_time_without_a_service_the_next_start_applies_the_cap",
    ),
    "a service that is frozen while it reports holds its row": broken(
        "sql/queries/consumer.sql",
        "SET LOCAL synchronous_commit = off;\nSET LOCAL statement_timeout = '30s';\nSET LOCAL "
        "idle_in_transaction_session_timeout = '30s';",
        "SET LOCAL synchronous_commit = off;",
        f"{ROTATION}::"
        "test_a_service_that_is_frozen_in_a_transaction_keeps_no_lock_for_long[report_limits]",
    ),
    "freed transactions of another cluster are believed": broken(
        "syncd/postgres/identity.py",
        '    "forget_freed",\n',
        "",
        f"{FALLING_BEHIND}::test_a_restored_copy_forgets_the_freed_changes_of_another_cluster",
    ),
    "a checkpoint forgets the window": broken(
        "syncd/sync/background/checkpoints.py",
        "if cursor.window is None\n        else SavedWindow",
        "if True\n        else SavedWindow",
        f"{LARGE}::test_one_large_transaction_goes_on_where_a_kill_left_it[100000]",
    ),
    "text comes in the encoding of a role or database": Trap(
        edits=(
            Edit("syncd/postgres/connection.py", '    "client_encoding": "UTF8",\n', ""),
            Edit("sql/queries/session.sql", "SET LOCAL client_encoding = 'UTF8';\n", ""),
        ),
        tests=(
            f"{SESSIONS}::test_a_service_and_every_command_work_under_odd_settings[database-18]",
        ),
    ),
    "a session reads text in the forms that it inherits": broken(
        "sql/queries/session.sql",
        "SET LOCAL datestyle = 'ISO, YMD';\n",
        "",
        f"{SESSIONS}::test_a_service_and_every_command_work_under_odd_settings[role-18]",
    ),
    "a primary that is read-only by default is a standby": broken(
        "syncd/postgres/connection.py",
        '"target_session_attrs": "primary"',
        '"target_session_attrs": "read-write"',
        f"{SESSIONS}::test_a_service_and_every_command_work_under_odd_settings[DSN-18]",
    ),
    "a time-out ends an idle listener": broken(
        "sql/queries/session.sql",
        "SET idle_session_timeout = 0;",
        "SELECT 1;",
        f"{SESSIONS}::test_the_connection_for_reports_and_the_listener_set_it_as_well[role]",
    ),
    "a setting stays in a session that a pooler shares": broken(
        "syncd/postgres/connection.py",
        "session.settings(connection) if own_forms",
        "session.own_session_settings(connection) if own_forms",
        "tests/faults/test_pooler.py::"
        "test_no_setting_stays_in_a_session_that_a_pooler_shares[plain]",
    ),
    "the planner may read the outbox as a whole and sort it": broken(
        "sql/queries/session.sql",
        "SET LOCAL enable_seqscan = off;\nSET LOCAL enable_sort = off;",
        "SET LOCAL enable_seqscan = on;\nSET LOCAL enable_sort = on;",
        f"{OUTBOX}::test_a_plan_made_while_the_outbox_was_empty_reads_a_page_of_a_large_one",
    ),
    "the registry is gone through without a copy": broken(
        "syncd/sync/registry/datasets.py",
        "return list(self.by_name.values())",
        "return self.by_name.values()",
        "tests/unit/test_registry.py",
    ),
    "a background task's error ends the service": broken(
        "syncd/supervision.py",
        "                if not has_started():\n",
        "                if True:\n",
        f"{ERRORS}::test_a_task_that_fails_is_reported_and_started_again[builder]",
    ),
    "an error of one source ends the pass": broken(
        "syncd/sync/consumer/guarding.py",
        "        if not is_of_source(connection, each, error):\n",
        "        if True:\n",
        f"{ERRORS}::"
        "test_an_unexpected_error_fails_its_source_and_the_others_go_on"
        "[syncd.sync.consumer.bringing:apply]",
    ),
    "a verify that never ends is not reported": broken(
        "syncd/sync/background/overdue.py",
        "    if not interval_seconds or not late:\n",
        "    if True:\n",
        f"{OVERDUE}::"
        "test_a_late_complete_verify_is_reported_by_check_the_page_and_status_with_the_reason",
    ),
    "one table's trouble keeps others from being verified": broken(
        "syncd/sync/background/verify.py",
        "            if len(ids) == 1 and only is not None:\n",
        "            if True:\n",
        f"{OVERDUE}::test_a_lock_that_is_waited_for_on_one_table_delays_no_other_verify",
    ),
    "a NULL is a key": broken(
        "syncd/postgres/outbox.py",
        "            if key is None:\n",
        "            if False:\n",
        f"{NULL_KEYS}::"
        "test_a_row_whose_key_is_null_is_in_quarantine_and_the_others_go_on[while it runs-text]",
    ),
    "renamed enum values are not noticed": broken(
        "syncd/postgres/catalogue.py",
        "if labels.get(number, label) != label:",
        "if False:",
        f"{RENAMES}::test_a_search_filters_on_the_new_name_of_a_renamed_value",
    ),
    "an error of the rule counts as the row's": broken(
        "syncd/sync/source/reading.py",
        "    check_rules(connection, source)\n    found, failing = halving",
        "    found, failing = halving",
        f"{RENAMES}::"
        "test_a_value_that_the_rule_names_by_an_old_name_fails_the_source_and_no_row_leaves",
    ),
    "a rule that fails on every row has the rows leave": broken(
        "syncd/sync/source/reading.py",
        "    if others and all(",
        "    if False and all(",
        f"{EXPRESSIONS}::"
        "test_a_function_that_fails_on_every_row_fails_the_source_and_no_row_leaves",
    ),
    "tables that swapped names are not noticed": broken(
        "syncd/ops/check_sources.py",
        "    yield from check_place(look, source)\n",
        "",
        f"{PLACES}::"
        "test_tables_that_swapped_names_are_reported_and_each_dataset_is_its_tables_again[False]",
    ),
    "a crash is not known to empty unlogged tables": broken(
        "syncd/sync/source/followed.py",
        "self.catalogue.facts.unlogged:",
        "False:",
        f"{UNLOGGED}[True-items]",
        f"{UNLOGGED}[False-items_1]",
    ),
    "recall is measured all the time": broken(
        "syncd/sync/background/builder.py",
        "and grows\n",
        "and False\n",
        "tests/unit/test_builder.py::test_recall_is_measured_again_when_rows_have_stopped_coming",
    ),
    "a lost database is an error of the task that meets it first": broken(
        "syncd/sync/consumer/progress.py",
        "elif self.connected and isinstance(error, DatabaseUnreachable):",
        "elif False:",
        f"{PROGRESS}::test_a_task_does_not_fail_if_the_consumer_loses_the_database_as_well",
    ),
    "a reader keeps a link that was lost": broken(
        "syncd/readers/handing_over.py",
        "if link is not None and not link.is_lost:",
        "if link is not None:",
        "tests/unit/rpc/test_reader_links.py",
    ),
    "a reader takes an open connection for a database that answers": broken(
        "syncd/readers/records.py",
        "return self.connected and now - self.last_pass_at < self.hangs_seconds",
        "return self.connected",
        "tests/integration/test_readers.py::"
        "test_while_the_main_process_does_not_run_answers_have_a_lag_and_waits_end",
    ),
}
