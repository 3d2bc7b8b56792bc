"""`python -m finetune_operator` runs the operator."""

from finetune_operator.main import main

if __name__ == "__main__":
    main()
