"""`python -m hf_bilb` and `accelerate launch -m hf_bilb`: the command line of `hf_bilb.cli`."""

from __future__ import annotations

from hf_bilb.cli import main

if __name__ == "__main__":
    main(prog_name="hf-bilb")
