"""Generated tasks: pictures of words, formulas, receipts and shapes, with questions and answers."""
