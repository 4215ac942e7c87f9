"""Logging is silent until an application configures it, and then goes through the standard library."""

import logging
import subprocess
import sys
from pathlib import Path

import structlog

from lynx.log import logger

HERE = Path(__file__).parent  # not the checkout, whose folder `lynx` would be found before the installed one
CODE = """
from lynx.log import logger
{setup}
logger.debug("lynx.looked", at="this")
logger.info("lynx.attached", adapter="transformers", layers=48)
logger.error("lynx.strategy_failed", layer="a.b", error="ZeroDivisionError: x")
"""


def output(setup=""):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(setup=setup)], capture_output=True, text=True, check=True, cwd=HERE
    )
    return done.stdout, done.stderr


def test_silent_unless_configured():
    assert output() == ("", "")


def test_the_applications_logging_decides():
    assert output("import logging; logging.basicConfig(level='INFO', format='%(levelname)s %(name)s %(message)s')") == (
        "",
        "INFO lynx lynx.attached adapter=transformers layers=48\n"
        "ERROR lynx lynx.strategy_failed layer=a.b error=ZeroDivisionError: x\n",
    )


def test_an_applications_structlog_settings_stay_its_own():
    setup = (
        "import logging, structlog; logging.basicConfig(level='ERROR', format='%(message)s')\n"
        "structlog.configure(processors=[structlog.processors.JSONRenderer()])"
    )
    assert output(setup) == ("", "lynx.strategy_failed layer=a.b error=ZeroDivisionError: x\n")


def test_importing_configures_nothing():
    assert not structlog.is_configured()
    lynx_logger = logging.getLogger("lynx")
    assert any(isinstance(handler, logging.NullHandler) for handler in lynx_logger.handlers)
    assert lynx_logger.level == logging.NOTSET
    assert lynx_logger.propagate


def test_events_are_rendered(caplog):
    with caplog.at_level(logging.INFO, "lynx"):
        logger.info("lynx.detached", layers=4)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("lynx", "INFO", "lynx.detached layers=4")
    ]
