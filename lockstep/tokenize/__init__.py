"""Between text and tokens: tokenizers, incremental detokenising, chat templates, output parsing, grammar masks.

text --chat--> prompt --tokenizer--> ids --(engine)--> ids --detokenise--> text --reasoning, tools--> events
                                          ^ grammar: which ids may come next
"""
