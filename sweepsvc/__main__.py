from sweepsvc.cli import main

main()
