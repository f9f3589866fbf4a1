"""What a model really sees of a sample: its ids, labels, views and visual tokens, as text or as a page.

sample      a record, a question or media files -> `Seen`, by the product's own processor
terminal    `Seen` in the terminal
page        `Seen` as a page with the views' pictures
"""
