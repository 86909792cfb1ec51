"""Checkpoints and figures that are written whole or not at all; checkpoints outlive one that cannot be written."""

import os
import zipfile
from pathlib import Path

from mmengine import hooks
from mmengine.dist import is_main_process
from mmengine.fileio import dump
from mmengine.fileio.backends import LocalBackend
from mmengine.registry import HOOKS

from tools.files import whole_file


class WholeFileBackend(LocalBackend):
    """Writes a file (each checkpoint goes through here) whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Raises OSError, naming the file."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'.{path.name}.partial')
        try:
            with open(partial, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@HOOKS.register_module(force=True)
class CheckpointHook(hooks.CheckpointHook):
    """MMEngine's, but a checkpoint that gives way to another is removed when that is written, not before."""

    def before_train(self, runner) -> None:
        super().before_train(runner)
        self.outdated: list[str] = []
        self.remove, self.file_backend.remove = self.file_backend.remove, self.outdated.append

    def _save_checkpoint_with_step(self, *args, **kwargs) -> None:
        super()._save_checkpoint_with_step(*args, **kwargs)
        self._remove_outdated()

    def _save_best_checkpoint(self, *args, **kwargs) -> None:
        super()._save_best_checkpoint(*args, **kwargs)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        while self.outdated:
            path = self.outdated.pop()
            if path not in (self.last_ckpt, getattr(self, 'best_ckpt_path', None)):  # written anew under its old name
                self.remove(path)


@HOOKS.register_module(force=True)
class LoggerHook(hooks.LoggerHook):
    """MMEngine's, but one process writes a test's figures.

    There every process writes its own to the same file, so that the end of longer ones can be left behind shorter ones.
    """

    def after_test_epoch(self, runner, metrics=None) -> None:
        log = runner.log_processor  # all processes take part, for it asks each for its memory
        figures, text = log.get_log_after_epoch(runner, len(runner.test_dataloader), 'test', with_non_scalar=True)
        runner.logger.info(text)
        if is_main_process():
            with whole_file(Path(runner.log_dir) / self.json_log_path) as partial:
                dump(self._process_tags(figures), partial)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there and not cut: a file, or a folder of files as DeepSpeed writes it.

    A file that is cut, by a full disk or a copy that broke off, lacks the list of contents at its end.
    """
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return bool(files) and all(map(zipfile.is_zipfile, files))


def latest_checkpoint(work_dir: str) -> str | None:
    """The newest whole checkpoint in ``work_dir``: the one MMEngine noted, else (the note may be cut) by date."""
    note = Path(work_dir, 'last_checkpoint')
    if note.is_file():
        noted = Path(work_dir, Path(note.read_text().strip()).name)  # by name: the folder may have moved
        if noted.name.endswith('.pth') and is_whole(noted):
            return str(noted)
    found = [path for kind in ('epoch', 'iter') for path in Path(work_dir).glob(f'{kind}_*.pth')]
    whole = filter(is_whole, sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True))
    return next(map(str, whole), None)
