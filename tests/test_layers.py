"""Imports run one way: cluster_fl <- actors <- ops, and the simulator itself knows nothing of Ray or terminals."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TERMINAL = {"rich", "tqdm", "click", "typer"}
FORBIDDEN = {
    "cluster_fl": {"ray", "wandb", "actors", "ops", "tests", *TERMINAL},
    "actors": {"ops", "wandb", "tests", *TERMINAL},
    "ops": {"tests"},
}
FILES = [file for package in FORBIDDEN for file in sorted((REPOSITORY / package).rglob("*.py"))]


def imported(source: str) -> Iterator[str]:
    """Top-level packages of every import statement, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def test_every_form_of_import_is_seen() -> None:
    source = (
        "import a.b, c\nfrom d.e import f\ndef g():\n    import h\n    from i import j\nfrom . import k\n"
    )
    assert set(imported(source)) == {"a", "c", "d", "h", "i"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_imports_run_one_way(file: Path) -> None:
    package = file.relative_to(REPOSITORY).parts[0]
    assert not set(imported(file.read_text(encoding="utf-8"))) & FORBIDDEN[package]


def loaded_by(module_names: list[str]) -> set[str]:
    program = (
        "import sys\nfrom importlib import import_module\n"
        "for name in sys.argv[1:]: import_module(name)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, *module_names],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(found.stdout.split())


def test_the_simulator_loads_without_ray() -> None:
    modules = [
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if file.relative_to(REPOSITORY).parts[0] == "cluster_fl"
    ]
    loaded = loaded_by(modules)
    assert {"cluster_fl", "torch"} <= loaded
    assert not loaded & {"ray", "wandb", "actors", "ops"}  # tqdm and rich come with others


def test_the_command_answers_help_without_torch_and_ray() -> None:
    assert not loaded_by(["ops.cli"]) & {"torch", "ray", "sklearn"}
