"""Projects: a user's pictures as records, held-out questions and a recipe, in one folder.

tables      a CSV, a JSON list or JSON lines -> rows of cells, each with its line
examples    rows, or a folder of pictures -> examples: a picture, a question, an answer
create      examples -> the folder
"""
