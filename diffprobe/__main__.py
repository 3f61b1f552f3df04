"""``python -m diffprobe`` and ``accelerate launch -m diffprobe`` are the command line."""

from diffprobe.cli import main

if __name__ == "__main__":
    main()
