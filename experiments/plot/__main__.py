from dppo_jax.errors import run_main
from experiments.plot.command import main

run_main(main)
