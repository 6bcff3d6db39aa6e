"""`python -m framewire.cli`."""

from framewire.cli import main

main()
