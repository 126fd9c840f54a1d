"""The command line, called in this process."""

import pytest

from polygpt.cli.main import main


@pytest.fixture
def polygpt(capsys):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""

    def call(*argv: object):
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
