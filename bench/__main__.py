"""`python -m bench`: the table of `bench.rounds`."""

from bench.rounds import main

if __name__ == "__main__":
    main()
