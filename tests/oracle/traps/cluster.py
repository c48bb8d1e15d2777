"""Traps in shards and in what asks them."""

from __future__ import annotations

from tests.oracle.traps.trap import Trap, broken

SHARDS = "tests/integration/test_shards.py"
EACH_ROW_ONCE = (
    f"{SHARDS}::test_every_row_is_in_exactly_one_shard_through_writes_kills_and_restarts"
)
ORACLE = (
    "tests/oracle/test_oracle.py::"
    "test_the_shards_of_a_cluster_have_every_row_once_after_any_sequence_of_these_and_reshards"
)
RESHARD = (
    f"{SHARDS}::"
    "test_a_reshard_that_is_killed_at_any_step_and_run_again_loses_no_answer_and_no_write"
)
SCATTER = "tests/unit/cluster/test_cluster_scatter.py"
MERGE = (
    "tests/unit/cluster/test_cluster_merge.py::"
    "test_the_nearest_rows_of_all_shards_are_the_nearest_of_all_rows"
)
BUCKETS = "tests/unit/test_shard.py::test_the_shards_of_a_layout_share_all_buckets"

CUTS = "tests/integration/test_cuts.py"

CLUSTER_TRAPS: dict[str, Trap] = {
    "a search at a cut sees later passes": broken(
        "syncd/sync/consumer/cuts.py",
        "return self.position, self.view",
        "return self.position, self.dataset.index.view",
        f"{CUTS}::test_all_shards_answer_at_one_snapshot_as_sql_does[25]",
    ),
    "replicas are verified at snapshots of their own": broken(
        "syncd/cluster/verifying.py",
        "VerifyParams(deep=deep, at=position)",
        "VerifyParams(deep=deep)",
        f"{CUTS}::test_a_cluster_is_verified_at_one_snapshot_while_writers_write",
    ),
    "a leader does not lock what changed": broken(
        "syncd/cluster/leading.py",
        "await connection.execute(source.lock())",
        "pass",
        f"{CUTS}::test_a_leader_holds_its_locks_while_shards_import",
    ),
    "the server sends a shard the keys of others": broken(
        "syncd/postgres/outbox.py",
        "page=page, mine=mine)",
        'page=page, mine=sql.SQL("true"))',
        f"{SHARDS}::test_the_server_sends_a_shard_only_its_own_keys_and_counts_all",
    ),
    "a shard reads the rows of others": broken(
        "syncd/postgres/source.py",
        '{"live": self.if_mine(raw(self.live))}',
        '{"live": raw(self.live)}',
        EACH_ROW_ONCE,
        ORACLE,
    ),
    "a scan reads the rows of other shards": broken(
        "syncd/postgres/source.py",
        "to_end=sql.Literal(until is None),",
        "to_end=sql.Literal(until is None),"
        ' **({"live": raw(self.live)} if vectors else {}),  # type: ignore[arg-type]',
        EACH_ROW_ONCE,
    ),
    "a verify compares with the rows of other shards": broken(
        "syncd/postgres/source.py",
        "to_end=sql.Literal(until is None),",
        "to_end=sql.Literal(until is None),"
        ' **({} if vectors else {"live": raw(self.live)}),  # type: ignore[arg-type]',
        EACH_ROW_ONCE,
    ),
    "a row has the bucket of its sort key": broken(
        "sql/queries/passes.sql",
        'hashtextextended({key} COLLATE "C", 0)',
        "hashtextextended({key}, 0)",
        EACH_ROW_ONCE,
    ),
    "two shards have one bucket": broken(
        "syncd/shard.py",
        "(self.number + 1) * BUCKETS // self.of) - 1",
        "(self.number + 1) * BUCKETS // self.of)",
        f"{BUCKETS}_and_none_is_much_larger[3]",
    ),
    "no shard has one bucket": broken(
        "syncd/shard.py",
        "return -(-self.number * BUCKETS // self.of)",
        "return -(-self.number * BUCKETS // self.of) + 1",
        f"{BUCKETS}_and_none_is_much_larger[3]",
    ),
    "a shard begins its next pass at once": broken(
        "syncd/sync/consumer/consumer.py",
        "await anyio.sleep(self.floor_left())",
        "await anyio.sleep(0)",
        f"{SHARDS}::test_passes_of_a_shard_keep_a_distance_that_grows_with_the_number_of_shards",
    ),
    "all shards verify at once": broken(
        "syncd/sync/background/turns.py",
        "if shard.is_whole:",
        "if True:",
        f"{SHARDS}::test_only_two_shards_verify_at_a_time",
    ),
    "a verify of all shards takes the handover of another one": broken(
        "syncd/sync/consumer/progress.py",
        "self.cut_handover, self.cut_handed_over = handover, False",
        "self.handover = self.cut_handover = handover; self.cut_handed_over = False",
        f"{SHARDS}::test_a_verify_of_each_shard_and_one_of_all_do_not_wait_for_each_other",
    ),
    "a reshard swaps before it is sure": broken(
        "syncd/cluster/operating.py",
        "        wait_for_shards(settings, of, say)\n",
        "        swap(settings, of)\n        wait_for_shards(settings, of, say)\n",
        RESHARD,
    ),
    "a rule runs on the rows of other shards": broken(
        "sql/queries/passes.sql",
        "CASE WHEN {mine} THEN {condition} ELSE {otherwise} END",
        "({condition} AND CASE WHEN {mine} THEN true ELSE {otherwise} END)",
        EACH_ROW_ONCE,
    ),
    "a table without rows of a shard has none that is live": broken(
        "sql/queries/verify.sql",
        "WHERE {mine})",
        "WHERE {mine} OR true)",
        EACH_ROW_ONCE,
    ),
    "a shard takes over the checkpoint of another": broken(
        "syncd/cluster/own_shard.py",
        "if manifest is None or manifest.shard == str(shard):",
        "if True:",
        f"{SHARDS}::test_a_directory_of_another_shard_is_refused_and_both_are_named",
    ),
    "an answer without a shard looks like a whole one": broken(
        "syncd/cluster/asking.py",
        'if lost and (partial == "refuse" or',
        "if lost and (False or",
        f"{SHARDS}::"
        "test_a_missing_shard_is_an_error_that_names_it_or_a_partial_answer_that_says_so[dead]",
    ),
    "another shard's rows are taken for those of a shard that is gone": broken(
        "syncd/cluster/replica.py",
        "if other != wanted:",
        "if False:",
        f"{SCATTER}::test_an_answer_of_another_shard_is_refused",
    ),
    "each request waits for a replica that does not answer": broken(
        "syncd/cluster/replica.py",
        "return self.time_outs >= TIME_OUTS",
        "return False",
        f"{SCATTER}::test_after_two_time_outs_a_replica_gets_only_probes_until_one_is_answered",
    ),
    "a late replica is waited for": broken(
        "syncd/cluster/scatter.py",
        "late = max(chosen[0].hedge_seconds - waited, 0.0) if waiting else None",
        "late = None",
        f"{SCATTER}::test_a_late_replica_is_not_waited_for",
    ),
    "a failed replica is the end of its shard": broken(
        "syncd/cluster/scatter.py",
        "if is_final(error) or (not under_way and not waiting):",
        "if True:",
        f"{SCATTER}::test_another_replica_is_asked_for_one_that_fails",
    ),
    "an answer has the newest of its positions": broken(
        "syncd/cluster/merge.py",
        "return min(positions,",
        "return max(positions,",
        f"{MERGE}[integer]",
    ),
}
