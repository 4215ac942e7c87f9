"""Tasks of lm-evaluation-harness, found by name or read from a user's own files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lynx.errors import ConfigError, did_you_mean

INSTALL = "pip install 'lynx-moe[lm-eval]'"
_FEWSHOT_SEED = 1234  # the harness's own, so that prompts are those of its command line


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks that were loaded, with their data.

    Attributes:
        tasks: The harness's tasks by name.
        groups: Its groups by name, whose scores are made of those of their tasks.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]

    def documents(self, limit: int | None = None) -> int:
        """How many documents there are, at most ``limit`` of each task."""
        counts = [len(task.eval_docs) for task in self.tasks.values()]
        return sum(count if limit is None else min(count, limit) for count in counts)

    def prepare(self, fewshot: int | None) -> None:
        """Make tasks ready for a run, so that every run builds the same prompts.

        Args:
            fewshot: Solved examples before each question, where a task does not insist on none; None for what a task
                says, and none where it says nothing.
        """
        for task in self.tasks.values():
            said = task.get_config("num_fewshot")
            if said is None or (fewshot is not None and said != 0):
                task.set_config("num_fewshot", fewshot or 0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def load_tasks(names: Sequence[str], include: Sequence[Path] = ()) -> Tasks:
    """Find tasks and load their data; the harness fetches data that is neither local nor in its cache.

    Args:
        names: Of tasks, groups or tags, as patterns if wanted (``arc_*``); or YAML files of tasks.
        include: Folders with YAML files of tasks, beside the harness's own.

    Raises:
        ConfigError: The harness is not installed, a name names nothing, or a task cannot be loaded or run.
    """
    manager_class = _manager_class()
    for folder in include:
        if not folder.is_dir():
            raise ConfigError(f"--include-path {str(folder)!r} is no folder.")
    files = {name: _group_of(name) for name in names if Path(name).suffix in (".yaml", ".yml")}
    # a group's file is found by its name alone, beside the files of its tasks
    folders = [*include, *(Path(file).parent for file, group in files.items() if group)]
    manager = manager_class(include_path=folders, include_defaults=False)
    # the harness's own tasks are 14,000 files: they are read where something may be among them
    if not (_is_whole(manager) and all(name in files or manager.match_tasks([name]) for name in names)):
        manager = manager_class(include_path=folders)
    specs = [
        spec for name in names for spec in ([files[name] or name] if name in files else _named(name, manager, include))
    ]
    try:
        loaded = manager.load(list(dict.fromkeys(specs)))
    except Exception as error:  # whatever a task's file and its data may raise
        raise ConfigError(f"lm-evaluation-harness cannot load {', '.join(names)}: {error}") from error
    _refuse(loaded["tasks"])
    return Tasks(loaded["tasks"], loaded.get("groups", {}))


def _manager_class() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness, which is not installed here ({error}): {INSTALL}"
        ) from error
    if not hasattr(TaskManager, "load"):
        raise ConfigError(f"--tasks needs lm-evaluation-harness 0.4.12 or later; this one is older: {INSTALL}")
    return TaskManager


def _group_of(file: str) -> str:
    """The name of the group that a file describes; empty for the file of a task."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tasks names {file!r}, which cannot be read: {error}") from error
    found = re.search(r"^group\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1].strip("\"'") if found else ""


def _is_whole(manager: Any) -> bool:
    """Whether all that the groups of an index name is in it."""
    members = [each for name in manager.all_groups for each in (manager.task_index[name].cfg or {}).get("task", [{}])]
    return all(isinstance(member, str) and member in manager.task_index for member in members)


def _named(name: str, manager: Any, include: Sequence[Path]) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if not found:
        index = manager.task_index
        own = [each for each in manager.all_tasks if _comes_from(index[each], include)]
        of_folders = f"--include-path has {', '.join(own) or 'none'}; " if include else ""
        raise ConfigError(
            f"--tasks names {name!r}, and there is no such task, group or tag.{did_you_mean(name, manager.all_tasks)} "
            f"{of_folders}the harness has {len(manager.all_tasks) - len(own)}, which `lm_eval ls tasks` lists. A file "
            "of your own is given by its path, or by its task's name and --include-path."
        )
    return found


def _comes_from(entry: Any, folders: Sequence[Path]) -> bool:
    return entry.yaml_path is not None and any(Path(entry.yaml_path).is_relative_to(folder) for folder in folders)


def _refuse(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"task {name!r} shows more than text to a model, which `lynx eval` does not.")
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"task {name!r} runs code that a model wrote, which `lynx eval` does not.")
