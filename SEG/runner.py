"""mmengine's runner, whose long lists go to the log's file and not to the terminal."""

import logging

import mmengine.runner
from mmengine.logging import MMLogger

from util.run.distributed import print_once

# How records begin that a terminal need not show: hundreds of lines on environment, config and
# hooks, and what mmengine has to say of its own parts.
_LONG = ("\n" + "-" * 60 + "\nSystem environment:", "Config:\n", "Hooks will be executed in the")
_OF_MMENGINE = ("The prefix is not set in metric", '"FileClient" will be', '"HardDiskBackend" is')


class Runner(mmengine.runner.Runner):
    """mmengine's runner with a short beginning on the terminal."""

    def build_logger(self, *args: object, **kwargs: object) -> MMLogger:
        """The logger; its file, `<work_dir>/<time>/<time>.log`, gets everything."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(_is_for_terminals)
        print_once(f"environment and config: {self._log_dir}/{self.timestamp}.log")
        return logger


def _is_for_terminals(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith((*_LONG, *_OF_MMENGINE))
