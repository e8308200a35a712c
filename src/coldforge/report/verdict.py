"""What a record says in a sentence or two."""

from __future__ import annotations

from collections.abc import Sequence

from coldforge.records import MaskingRecord, Record, StageRecord
from coldforge.report import text
from coldforge.report.table import (
    SUSPECT,
    UNCHECKED,
    WORST,
    attacks,
    is_eager,
    is_unchecked,
    shown_speed,
    subject,
)


def headline(record: Record) -> str:
    """The verdict in a sentence or two, from the record only; says so where the artifact is not better."""
    stage, base = subject(record), record.stage("baseline")
    who = {"artifact": "The artifact"}.get(stage.name, f"The {stage.label} network")
    lead = "" if stage.name == "artifact" else "No artifact was exported. "
    if base is None or base is stage:
        lead = "" if stage is base else lead
        sentence = f"{lead}{who} has {_pct(stage.clean_accuracy)} clean accuracy{_alone(stage, record)}."
    else:
        parts = [_clean(stage, base), _robust(stage, base, record), _efficiency(stage, base, record)]
        found = [part for part in parts if part]
        body = ", ".join(found[:-1]) + f", and {found[-1]}" if len(found) > 2 else " and ".join(found)
        sentence = f"{lead}{who} {body}."
    caution = SUSPECT if record.is_suspect(stage) else UNCHECKED if is_unchecked(stage) else ""
    return f"{sentence} {caution}".rstrip()


def verdict_lines(masking: MaskingRecord) -> list[str]:
    """The masking verdict: one line, and one for each check that failed, with what to do."""
    if masking.verdict == "not_run":
        return ["Masking checks: not run" + (f": {masking.checks[-1].meaning}" if masking.checks else "") + "."]
    far = ", as far as a black box can be asked" if masking.of_black_box and masking.verdict == "ok" else ""
    lines = [f"Masking checks: {masking.verdict}{far}; {masking.tally}."]
    for check in masking.failed:
        compared = f"{text.digits3(check.value)} against {text.digits3(check.threshold)}"
        lines.append(f"  failed: {check.name.replace('_', ' ')}: {compared}. {check.meaning}")
    return lines


def _pct(fraction: float) -> str:
    return f"{text.percent(fraction)} %"


def strongest(stage: StageRecord, record: Record) -> str | None:
    """What leaves the least robust accuracy: an attack (the later of equals), or all, WORST. None: there was none."""
    names = [name for name in (*reversed(attacks(record)), WORST) if name in stage.robust_accuracy]
    return min(names, key=lambda name: stage.robust_accuracy[name]) if names else None


def _alone(stage: StageRecord, record: Record) -> str:
    name = strongest(stage, record)
    return f" and {_pct(stage.robust_accuracy[name])} {text.under(name)}" if name else "; no attack was run"


def _clean(stage: StageRecord, base: StageRecord) -> str:
    mine, theirs = stage.clean_accuracy, base.clean_accuracy
    verb = "reaches" if mine >= theirs else "has" if mine >= 0.85 * theirs else "falls to"
    points = f"{round(100 * mine, 1) - round(100 * theirs, 1):+.1f}".replace("-", "−")  # of the numbers shown
    return f"{verb} {_pct(mine)} clean accuracy (baseline {_pct(theirs)}: {points} points)"


def _robust(stage: StageRecord, base: StageRecord, record: Record) -> str:
    name = strongest(stage, record)
    if name is None:
        return "was not attacked, so that its robustness is unknown"
    mine, theirs = stage.robust_accuracy[name], base.robust_accuracy.get(name)
    if theirs is None:
        return f"holds {_pct(mine)} {text.under(name)} (baseline not attacked)"
    mine_95, theirs_95 = stage.robust_ci95.get(name, (mine, mine)), base.robust_ci95.get(name, (theirs, theirs))
    if mine_95[0] > theirs_95[1]:
        return f"holds {_pct(mine)} {text.under(name)} (baseline {_pct(theirs)})"
    if mine_95[1] < theirs_95[0]:
        return f"falls to {_pct(mine)} {text.under(name)} (baseline {_pct(theirs)})"
    return f"holds {_pct(mine)} {text.under(name)}, no measurable gain over the baseline's {_pct(theirs)}"


def _efficiency(stage: StageRecord, base: StageRecord, record: Record) -> str:
    words = []
    if stage.size_bytes and base.size_bytes:
        words.append(_compare(base.size_bytes / stage.size_bytes, "smaller", "larger", "about as large as"))
    found = shown_speed(record, stage, 64) or shown_speed(record, stage, 1)
    against = ""
    if found is not None and found.speedup is not None:
        words.append(_compare(found.speedup, "faster", "slower", "about as fast as"))
        runtime = text.runtime(found.latency.runtime)
        if found.speedup_eager is None:
            against = f" in {runtime}, at batch {found.latency.batch}"
        elif found.speedup_same is not None and not is_eager(found.latency):
            both = _compare(found.speedup_same, "faster", "slower", "about as fast")
            against = f" in eager PyTorch ({both} with both in {runtime}), at batch {found.latency.batch}"
        else:
            against = f" in eager PyTorch, at batch {found.latency.batch}"
    if not words:
        return ""
    return f"is {_than(words)} the dense network{against}"


def _compare(ratio: float, better: str, worse: str, equal: str) -> str:
    if 0.95 < ratio < 1.05:
        return equal
    factor = text.times(max(ratio, 1 / ratio)).removesuffix("×")
    return f"{factor} times {better if ratio > 1 else worse}"


def _than(words: Sequence[str]) -> str:
    """Join comparisons: "3 times smaller and 4 times faster than", "about as large as and 4 times faster than"."""
    closed = [word if word.endswith(" as") else f"{word} than" for word in words]
    if len(words) == 2 and not any(word.endswith(" as") for word in words):
        return f"{words[0]} and {words[1]} than"
    return " and ".join(closed)
