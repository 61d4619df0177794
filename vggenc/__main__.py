"""`python -m vggenc` is the command `vggenc`."""

from vggenc.cli import main

if __name__ == "__main__":
    main()
