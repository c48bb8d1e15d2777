"""Traps in the index, and in how the RPC schedules searches."""

from __future__ import annotations

from tests.oracle.traps.trap import Trap, broken

CODES = "tests/unit/index/test_index_codes.py"
SAVED_CODES = "tests/unit/index/test_saved_codes.py"
COMPACTION = "tests/unit/index/test_compaction.py"
RECALL = "tests/unit/index/test_recall.py"
REACH = "tests/unit/index/test_reach.py"
ASKED = "tests/unit/index/test_asked.py"
CODES_ORACLE = "tests/unit/index/test_index_codes_oracle.py"
QUEUE = "tests/unit/rpc/test_rpc_search_queue.py"

INDEX_TRAPS: dict[str, Trap] = {
    "dead rows are candidates": broken(
        "syncd/index/codes/codes.py",
        "SearchParametersIVF(sel=self._selector, nprobe",
        "SearchParametersIVF(nprobe",
        CODES_ORACLE,
    ),
    "rows without codes are not searched": broken(
        "syncd/index/search/approximate.py",
        "if codes.codes.stop < view.count",
        "if False",
        CODES_ORACLE,
    ),
    "a compaction does not see rows that died during it": broken(
        "syncd/index/generation/compaction.py",
        "if view.live.bits is before.live.bits:",
        "if True:",
        CODES_ORACLE,
    ),
    "a change may come in the last moment of a compaction": broken(
        "syncd/index/dataset.py",
        "with self._write_lock:\n            return self._apply",
        "if True:\n            return self._apply",
        f"{COMPACTION}::test_a_change_in_the_last_moment_of_a_compaction_waits_for_it",
    ),
    "a sweep forgets what it saw before a compaction": broken(
        "syncd/index/building.py",
        "self._seen = move.seen(self._seen)",
        "pass",
        f"{COMPACTION}::test_a_sweep_goes_on_in_the_new_generation",
    ),
    "a compaction copies rows that it did not check": broken(
        "syncd/index/building.py",
        "source.generation.scrub(stop)",
        "pass",
        f"{COMPACTION}::test_damage_that_was_not_noticed_is_not_copied",
    ),
    "a filter's rows are taken from all that the codes find": broken(
        "syncd/index/search/approximate.py",
        "enough = places.size >= wanted and places[wanted - 1] < point.k",
        "enough = True",
        f"{CODES}::test_unselective_filters_use_the_codes_and_reach_the_recall",
    ),
    "recall is measured against rounded distances": broken(
        "syncd/index/build/neighbors.py",
        "(farthest**2 <= left_out**2 - error)",
        "True",
        "tests/unit/index/test_index_neighbors.py",
    ),
    "rows of another chunk are taken": broken(
        "syncd/index/storage/window.py",
        "self._bases[rows >> self._shift] +",
        "self._bases[0] +",
        "tests/unit/index/test_index_files.py",
    ),
    "a longer search never leaves the event loop": broken(
        "syncd/rpc/in_place.py",
        "and now >= self._company_until",
        "",
        "tests/unit/rpc/test_rpc_in_place.py",
    ),
    "joined codes lack a row": broken(
        "syncd/index/build/joining.py",
        "return slots[alive], codes[alive]",
        "return slots[alive][1:], codes[alive][1:]",
        f"{CODES}::test_joined_codes_are_those_that_encoding_all_rows_would_give[False-l2]",
    ),
    "a quick measurement is never repeated with more queries": broken(
        "syncd/index/build/plan.py",
        "if not measured.whole or",
        "if",
        f"{CODES}::test_new_codes_serve_the_ten_nearest_at_once_and_more_when_that_is_measured",
    ),
    "codes of rows that are gone are used": broken(
        "syncd/index/shared/present.py",
        "if not same_rows or state.codes",
        "if state.codes",
        f"{CODES}::test_codes_of_rows_that_were_cleared_during_the_build_are_not_used",
    ),
    "new codes take the names of saved ones": broken(
        "syncd/index/dataset.py",
        "index._code_number = saved.code_number",
        "index._code_number = 0",
        f"{SAVED_CODES}::test_new_codes_never_overwrite_those_of_a_checkpoint_that_is_kept",
    ),
    "damaged codes are served": broken(
        "syncd/index/codes/files.py",
        "memoryview(read_file(directory / name, files[name]))",
        "memoryview((directory / name).read_bytes())",
        f"{SAVED_CODES}::"
        "test_damaged_codes_are_built_again_from_the_vectors_and_searches_are_exact_until_then"
        "[changed-part]",
    ),
    "recall is claimed above its lower bound": broken(
        "syncd/index/codes/calibration.py",
        "return min(self.bound, self.recall)",
        "return self.recall + 0.02",
        f"{CODES}::test_the_recall_of_other_rows_is_at_or_above_each_target",
    ),
    "rows alone are the queries": broken(
        "syncd/index/build/measuring.py",
        "kinds += [_noisy(view, slots, wanted, random), _between(view, slots, wanted, random)]",
        "pass",
        f"{RECALL}::test_the_promise_is_kept_for_queries_that_have_no_near_copies",
    ),
    "made queries choose how far a query searches": broken(
        "syncd/index/build/measuring.py",
        "if lists >= self._most or not self._adaptive:",
        "if lists >= self._most:",
        f"{REACH}::test_settings_have_a_reach_only_when_real_queries_chose_them",
    ),
    "dead rows are not tested for": broken(
        "syncd/index/codes/codes.py",
        "if live == sum(part.rows for part in self.codes.parts):",
        "if True:",
        f"{REACH}::test_dead_rows_are_no_candidates_and_are_tested_only_if_there_are_any",
    ),
    "codes of an earlier form stay": broken(
        "syncd/index/build/plan.py",
        "or not codes.codebook.is_current",
        "or False",
        "tests/unit/index/test_saved_codes.py"
        "::test_codes_of_an_earlier_form_are_read_joined_and_trained_again",
    ),
    "queries that were asked are not measured": broken(
        "syncd/index/build/plan.py",
        "if asked is not None and asked.is_due(dim, measured.of):",
        "if False:",
        f"{RECALL}::test_real_queries_are_measured_as_soon_as_there_are_enough",
    ),
    "the easiest kind of queries counts": broken(
        "syncd/index/build/measuring.py",
        "min(map(_lower_bound, of_each)),",
        "max(map(_lower_bound, of_each)),",
        f"{RECALL}::test_real_queries_are_measured_as_soon_as_there_are_enough",
    ),
    "recall that an earlier version measured is kept": broken(
        "syncd/index/build/plan.py",
        "or measured.version != VERSION:",
        "or False:",
        f"{RECALL}::test_saved_codes_of_an_earlier_version_are_measured_again",
    ),
    "filtered searches that miss a recall are not exact": broken(
        "syncd/index/search/plan.py",
        "if recall > view.codes.codes.calibration.filtered:",
        "if False:",
        f"{RECALL}::test_filtered_searches_that_miss_a_recall_are_exact",
    ),
    "the first queries stay in the sample": broken(
        "syncd/index/asked.py",
        "if place >= size:",
        "if True:",
        f"{ASKED}::test_every_query_has_the_same_chance_to_be_sampled",
    ),
    "old queries do not fade": broken(
        "syncd/index/asked.py",
        "min(self._seen + 1, REMEMBERED)",
        "self._seen + 1",
        f"{ASKED}::test_the_sample_is_bounded_and_old_queries_fade",
    ),
    "searches that wait do not go together": broken(
        "syncd/rpc/search_queue.py",
        "if common is None or",
        "if True or",
        f"{QUEUE}::test_waiting_searches_go_together_once_a_thread_is_free",
    ),
    "a cancelled search keeps its turn": broken(
        "syncd/rpc/search_queue.py",
        "                self._cost -= mine.cost\n                self._next_turn()",
        "                pass",
        f"{QUEUE}::test_a_search_that_is_cancelled_at_the_moment_of_its_turn_passes_the_turn_on",
    ),
}
