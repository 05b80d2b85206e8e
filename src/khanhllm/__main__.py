import sys


def main() -> int:
    """The command `khanhllm`; also of Ctrl-C while Python still imports it there is one line."""
    try:
        from khanhllm import cli

        return cli.main()
    except KeyboardInterrupt:
        print("khanhllm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
