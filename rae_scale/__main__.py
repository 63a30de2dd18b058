"""`python -m rae_scale`, and what launchers start: `deepspeed --module rae_scale train ...`."""

from rae_scale.cli.main import main

if __name__ == "__main__":
    main()
