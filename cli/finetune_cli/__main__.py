"""The `finetune` command's entry: Ctrl-C while the command is still being imported ends it without a traceback."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from finetune_cli.app import main as run
    except KeyboardInterrupt:
        return 130  # errors.Exit.INTERRUPTED: an import that has just been stopped is not tried again
    return run()


if __name__ == "__main__":
    sys.exit(main())
