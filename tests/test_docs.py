"""README.md, CONTRIBUTING.md and their relatives: length, links, commands, options and the tree of files."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vit_jax
from vit_jax import __main__ as entry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/promises.md")]


def code(page: Path, language: str) -> str:
    """The code blocks of a language in a page, joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return "\n".join(text for name, text in blocks if name == language)


def commands(text: str) -> list[list[str]]:
    """The `vit_jax` commands of a page, in its code blocks and its inline code, each as a list of arguments."""
    lines = re.findall(r"^vit_jax .*$", text, re.MULTILINE) + re.findall(r"`(vit_jax [^`\n]*)`", text)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    named = re.findall(r"\b(?:vit_jax|tests|docs|configs)/[\w/.-]*\w\b", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)) <= targets


def test_readme_commands_and_options_exist(capsys):
    found = commands((ROOT / "README.md").read_text())
    assert {command[0] for command in found if not command[0].startswith("-")} == set(entry.COMMANDS)
    for command, *rest in found:
        words = [command, *([rest[0]] if command in ("data", "checkpoints") else [])]
        try:
            entry.main([*words, "--help"])
        except SystemExit as error:
            assert error.code == 0, words
        text = capsys.readouterr().out
        for option in (word.split("=")[0] for word in rest if word.startswith("--")):
            assert option in text, (words, option)


def test_readme_python_uses_names_that_exist():
    tree = ast.parse(code(ROOT / "README.md", "python"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vit_jax"
    }
    assert used and all(getattr(vit_jax, name) for name in used)


def test_contributing_tree_lists_every_file_of_the_package():
    folders: list[str] = []
    listed = set()
    for line in code(ROOT / "CONTRIBUTING.md", "").splitlines():
        if found := re.match(r"( *)([\w./]+(?:, [\w./]+)*)", line):
            names = found[2].split(", ")
            folders = folders[: len(found[1]) // 2]
            if names[0].endswith("/"):
                folders.append(names[0])
            else:
                listed |= {"".join(folders) + name for name in names}
    files = {str(path.relative_to(ROOT)) for room in ("vit_jax", "configs") for path in (ROOT / room).rglob("*.py")}
    listed = {name for name in listed if name.startswith(("vit_jax/", "configs/"))}
    assert files - listed == set(), "files that CONTRIBUTING.md does not list"
    assert listed - files == set(), "files that CONTRIBUTING.md lists and that do not exist"


def test_every_module_has_its_test_file():
    elsewhere = {"vit_jax/interop/peers.py": "tests/peers/test_peers.py"}  # there are all tests that need PyTorch
    modules = [path.relative_to(ROOT) for path in (ROOT / "vit_jax").rglob("*.py") if path.name != "__init__.py"]
    assert elsewhere.keys() <= {module.as_posix() for module in modules}
    wanted = [
        elsewhere.get(module.as_posix()) or Path("tests", *module.parts[1:-1], f"test_{module.stem.strip('_')}.py")
        for module in modules
    ]
    assert [str(path) for path in wanted if not (ROOT / path).is_file()] == []


def test_pre_commit_hooks_run_the_tools_of_the_project():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", text) == ["local"]
    entries = re.findall(r"entry: python -m (\S+)", text)
    assert entries == ["ruff", "ruff", "mypy"] and text.count("language: system") == text.count("entry: ") == 3
    for tool in entries:
        done = subprocess.run([sys.executable, "-m", tool, "--version"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
