"""What every test starts from."""

import logging

import pytest

OWN = ("mas", "preprocess", "train")


@pytest.fixture(autouse=True)
def own_loggers_speak():
    """Undoes what a library's logging set-up in an earlier test did to this project's loggers."""
    logging.disable(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] in OWN and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
