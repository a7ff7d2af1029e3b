"""Every command line that the documents show is one that its program understands."""

import argparse
import ast
import configparser
import importlib
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from idea_jax.config import reading
from idea_jax.config.settings import ConfigError, SampleConfig, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"train_jax.py": TrainConfig, "sample_jax.py": SampleConfig}
# What a reader puts where a command has three dots; whatever the command says itself wins.
REST = {
    "train_jax.py": "--pretrained_model_name_or_path MODEL --train_data_dir PHOTOS",
    "sample_jax.py": "--pretrained_model_name_or_path MODEL --identity FILE --prompt {}",
    "idea_jax.faces": "PHOTOS",
}


def console_commands():
    """What a command such as idea-train starts, by setup.cfg: a script or a module."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    for line in parser["options.entry_points"]["console_scripts"].split("\n"):
        if "=" in line:
            name, module = (part.strip() for part in line.split("="))
            module = module.partition(":")[0].removesuffix(".__main__")
            yield name, f"{module}.py" if f"{module}.py" in CLASSES else module


CONSOLE = dict(console_commands())


def commands():
    """(document, command) of every block of code and of every command within a sentence."""
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))):
        content = path.read_text("utf-8")
        fenced = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
        indented = re.findall(r"(?<=\n\n)(?:    .*\n)+", fenced.sub("", content))
        blocks = [*fenced.findall(content), *map(textwrap.dedent, indented)]
        lines = [line for block in blocks for line in whole_lines(block)]
        # What launchers are given is a command, too.
        lines += [line.rpartition("&& ")[2].rstrip('"') for line in lines if "&& python" in line]
        lines += [re.sub(r"^srun .*? (?=python)", "", line) for line in lines if "srun " in line]
        named = re.findall(r"`((?:python3?|idea-[\w-]+) [^`]+)`", content)
        # In a sentence, a program without arguments is its name, and N is any number.
        words = [code.split() for code in named]
        lines += [" ".join(code).replace(" N", " 1") for code in words if len(code) > 3]
        for line in lines:
            if re.match(r"\s*(?:\w+=\S+ )*(?:python3?|idea-[\w-]+) ", line):
                yield path.name, line.strip()


def whole_lines(block):
    """The lines of a shell, joined where one ends in a backslash or within quotation marks."""
    joined = ""
    for line in block.splitlines():
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
        elif joined.count('"') % 2:
            joined += "\n"
        else:
            yield joined
            joined = ""
    yield joined


FOUND = sorted(set(commands()))


class Parsed(Exception):
    """The program has understood its arguments; what it would do then is not done."""


def understood(command, monkeypatch):
    """The program of a command; raises what a user would meet where it refuses the rest."""
    words = [
        word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)
    ]
    program, *arguments = words[1:] if words[0].startswith("python") else words
    program = CONSOLE.get(program, program)
    if program == "-c":
        ast.parse(arguments[0])
        return "python"
    if program == "-m":
        program, *arguments = arguments
    if program in ("pytest", "pip"):
        return program
    if "..." in arguments and program in REST:
        arguments.remove("...")
        rest = REST[program].split()
        if "--dataset" in arguments or "--train_data_dir" in arguments:
            rest = rest[:2] if program == "train_jax.py" else []
        arguments += rest
    if program in CLASSES:
        reading.parse(CLASSES[program], arguments)
        return program
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *given):
        raise Parsed(parse(self, *given))

    is_package = (ROOT / program.replace(".", "/") / "__main__.py").is_file()
    name = f"{program}.__main__" if is_package else program
    module = importlib.import_module(name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed):
        module.main()
    return name


def test_the_documents_have_commands():
    documents = {"README.md", "enhancer.md", "faces.md", "guide.md", "scale.md"}
    assert {document for document, _ in FOUND} >= documents
    assert len(FOUND) > 25
    assert len([c for d, c in FOUND if d == "enhancer.md" and "idea-train-enhancer" in c]) >= 2
    assert ("scale.md", "python train_jax.py ... --distributed") in FOUND


@pytest.mark.parametrize(("document", "command"), FOUND)
def test_a_documented_command_is_understood(document, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert understood(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python train_jax.py --pretrained_model_name_or_path M --train_data_dir D --no_such_flag 1",
        "python sample_jax.py --pretrained_model_name_or_path M --prompt {}",
        "python -m idea_jax.faces photos --out x --no_such_flag",
        "python -c 'this is no Python'",
    ],
)
def test_a_command_that_no_program_understands_is_found(command, monkeypatch, capsys):
    with pytest.raises((SystemExit, ConfigError, SyntaxError)):
        understood(command, monkeypatch)


def test_every_flag_that_is_only_accepted_stands_in_the_guide():
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    for flags in reading.FOREIGN_FLAGS.values():
        for flag in flags:
            assert f"`--{flag}`" in guide


def anchor(heading):
    """What a link calls a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "document", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name
)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, part = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), link
