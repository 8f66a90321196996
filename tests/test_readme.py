"""README.md: every command in it names files and flags that exist, and its test command is the one that CI runs."""

import re

import pytest
from scripts import PROJECT, run

README = (PROJECT / "README.md").read_text().replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines()]
CALLS = sorted({call for line in COMMANDS for call in re.findall(r"(?:python|torchrun)\s[^&|;]*", line)})


def test_the_readme_has_the_commands_a_stranger_needs():
    assert any("requirements.txt" in line and line.endswith("python drsl.py") for line in COMMANDS)
    assert "python tests" in COMMANDS
    assert "\npython tests\n" in (PROJECT / ".ci/run").read_text()


@pytest.mark.parametrize("call", [call for call in CALLS if ".py" in call])
def test_commands_name_scripts_and_flags_that_exist(call, tmp_path):
    script = re.search(r"([\w/]+\.py)", call).group(1)
    assert (PROJECT / script).exists()
    known = run(tmp_path, script, "--help")
    for flag in re.findall(r"(?<!\S)--[\w-]+", call[call.index(script):]):
        assert re.search(rf"{flag}(?![\w-])", known), flag


def test_pictures_and_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (PROJECT / target).exists(), target
    named = set(re.findall(r"`(\w+\.py)`", README))
    absent = {name for name in named if not (PROJECT / name).exists()}
    assert all(f"`{name}` (not yet)" in README for name in absent)


EXERCISES = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_exercises_print_what_they_say(exercise, capsys):
    exec(compile(exercise, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = "\n".join(line.split("#", 1)[1] for line in exercise.splitlines() if "#" in line)
    assert printed and all(line in said for line in printed)
