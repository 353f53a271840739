"""Whatever is done to a configuration, the user sees one line or a plan, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cluster_fl.config import Config
from ops.cli import main
from tests.tiny import TINY

Node = dict[str, Any]
BASE: Node = yaml.safe_load(TINY)


def keys(node: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of all options and sections of the schema."""
    for spec in fields(node):
        yield (*prefix, spec.name)
        if is_dataclass(value := getattr(node, spec.name)):
            yield from keys(value, (*prefix, spec.name))


KEYS = [
    *keys(Config()),
    ("options", "kd_weight"),
    ("model", "options", "widths"),
    ("options",),
    ("no", "such"),
]
WORDS = [key[-1] for key in KEYS]
NUMBERS = [0, -1, 1, 2, 7, 10**6, 10**12, -(10**30), 0.0, -0.5, 1e-9, 1e308, float("nan"), float("inf")]
TEXTS = [
    "",
    " ",
    "0",
    "auto",
    "none",
    "null",
    "../../etc",
    "/etc/passwd",
    "a/b",
    "..",
    "\0",
    "é\n",
    "x" * 5000,
    "${a}",
    "!!",
]
PLAIN = (
    st.sampled_from([None, True, False, *NUMBERS, *TEXTS]) | st.text(max_size=8) | st.integers() | st.floats()
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A file of which some keys have other values, or some characters are others."""
    content = copy.deepcopy(BASE)
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        node: Any = content
        for name in key[:-1]:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[key[-1]] = draw(VALUES)
    text = yaml.safe_dump(content)
    for at in draw(st.lists(st.integers(0, len(text) - 1), max_size=draw(st.sampled_from([0, 0, 0, 4])))):
        text = text[:at] + draw(st.sampled_from(list("{}[]:,-#&*!|>'\"%@` \n\t0a"))) + text[at + 1 :]
    return text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=mutated())
def test_a_mutated_configuration_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mutated.yaml"
    file.write_text(text)
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["plan", str(file), "--quiet"])
    event(f"exit code {code}")
    assert out.getvalue() == ""
    assert code in (0, 2)
    assert err.getvalue().count("\n") == (0 if code == 0 else 1)
    assert err.getvalue().startswith("cluster-fl: ") == (code == 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mutated.yaml"]
