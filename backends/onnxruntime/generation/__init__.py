"""Language models that take only the tokens that are new, as onnxruntime-genai runs them.

positions.py   what depends on positions only, in a program
rewrite.py     a program of whole sequences -> the program of new tokens
wire.py        its exported model -> one with inputs and outputs of a cache
generator.py   that model, continuing a text; sampling.py chooses its tokens
folder.py      the files that onnxruntime-genai wants beside it
"""
