"""Run `python -m mobilemm`; `accelerate launch -m mobilemm …` starts here too."""

from mobilemm.cli import main

main()
