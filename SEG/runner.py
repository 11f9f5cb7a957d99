"""mmengine's runner: a short beginning on the terminal, workers that outlive a signal."""

import logging

import mmengine.runner
from mmengine.logging import MMLogger
from torch.utils.data import DataLoader

from util.run.distributed import print_once, shield_workers

# How records begin that a terminal need not show: hundreds of lines on environment, config and
# hooks, and what mmengine has to say of its own parts.
_LONG = ("\n" + "-" * 60 + "\nSystem environment:", "Config:\n", "Hooks will be executed in the")
_OF_MMENGINE = ("The prefix is not set in metric", '"FileClient" will be', '"HardDiskBackend" is')


class Runner(mmengine.runner.Runner):
    """mmengine's runner, whose long lists go to the log's file and not to the terminal."""

    def build_logger(self, *args: object, **kwargs: object) -> MMLogger:
        """The logger; its file, `<work_dir>/<time>/<time>.log`, gets everything."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(_is_for_terminals)
        print_once(f"environment and config: {self._log_dir}/{self.timestamp}.log")
        return logger

    @staticmethod
    def build_dataloader(*args: object, **kwargs: object) -> DataLoader:
        """The loader of a config, whose workers leave signals to the run."""
        loader = mmengine.runner.Runner.build_dataloader(*args, **kwargs)
        shield_workers(loader)
        return loader


def _is_for_terminals(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith((*_LONG, *_OF_MMENGINE))
