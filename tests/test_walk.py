"""The README's way from a clone to a validated submission: its commands, on a smaller search."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent


def walk() -> list[str]:
    """Reads the commands of the README's section."""
    section = (REPOSITORY / "README.md").read_text().split("## From a clone to a submission\n")[1].split("\n## ")[0]
    return re.findall(r"^    (\S.*)$", section, re.MULTILINE)


def copied(to: Path) -> Path:
    """Copies the repository's files, and puts the models where an installed package has them."""
    command = ["git", "-C", REPOSITORY, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).exists() and not name.startswith(("tests/", "benchmarks/")):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, to / name)
    for src in to.glob("model_zoo/*/src"):
        (to / "flowctr" / "models" / src.parent.name).symlink_to(src)
    return to


def test_the_way_from_a_clone_to_a_submission(tmp_path):
    commands = walk()
    install = [command for command in commands if command.startswith(("git ", "python3 -m venv", "pip install"))]
    assert len(install) == 3 and commands[:3] == install
    assert 3 < len(commands) <= 8
    folder = copied(tmp_path / "clone")
    tuner = folder / shlex.split(commands[3])[2]
    space = yaml.safe_load(tuner.read_text())
    space["tuner_space"] = {"learning_rate": space["tuner_space"]["learning_rate"]}
    tuner.write_text(yaml.safe_dump(space))
    program = [sys.executable, "-c", "from flowctr.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    for command in commands[3:]:
        name, *arguments = shlex.split(command)
        assert name == "flowctr", command
        done = subprocess.run([*program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (folder / "report" / "index.html").is_file()
    (table,) = folder.glob("submission/**/results.csv")
    assert len(table.read_text().splitlines()) == 3  # one line for each seed
