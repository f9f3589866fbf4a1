"""`llavakit studio`: a page on which a folder of pictures becomes a trained, evaluated and served model.

jobs       commands of llavakit as processes of their own, which outlive the page
project    a folder that `llavakit new` made, and what its commands have left in it
page       the page, in Gradio
run        the command: the page under the server's rules
"""
