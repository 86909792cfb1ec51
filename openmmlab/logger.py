"""The log of a test on several processes."""

import os
from pathlib import Path

from mmengine import hooks
from mmengine.dist import is_main_process
from mmengine.fileio import dump
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module(name='LoggerHook', force=True)
class LoggerHook(hooks.LoggerHook):
    """MMEngine's, but one process writes a test's figures, the file whole or not at all.

    There every process writes its own to the same file, so that the end of longer ones can be left behind shorter ones.
    """

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Log the figures; the main process also writes them to ``<log dir>/<time stamp>.json``."""
        log = runner.log_processor  # all processes take part, for it asks each for its memory
        figures, text = log.get_log_after_epoch(runner, len(runner.test_dataloader), 'test', with_non_scalar=True)
        runner.logger.info(text)
        if not is_main_process():
            return
        path = Path(runner.log_dir) / self.json_log_path
        partial = path.with_name(f'.{path.name}')
        dump(self._process_tags(figures), partial, file_format='json')
        os.replace(partial, path)
