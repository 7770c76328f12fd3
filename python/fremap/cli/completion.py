"""Print the script that sets up completion of this command in a shell.

Completion needs argcomplete: pip install argcomplete.

bash:  fremap completion bash >> ~/.bashrc
zsh:   fremap completion zsh >> ~/.zshrc
fish:  fremap completion fish > ~/.config/fish/completions/fremap.fish
"""

import argparse

from fremap.cli.report import print_json, show
from fremap.errors import UnsupportedError

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap completion``."""
    parser.add_argument("shell", choices=SHELLS)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise UnsupportedError(
            "completion: argcomplete is not installed; pip install argcomplete"
        ) from error
    script = shellcode(["fremap"], shell=arguments.shell)
    if arguments.json:
        print_json({"shell": arguments.shell, "script": script})
    else:
        show(script)
    return 0
