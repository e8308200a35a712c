"""The report: what a record says, as a terminal table, as figures and as one self-contained HTML page.

This layer reads only records (:mod:`coldforge.records`) and adversarial examples; nothing is measured here.

    text        how numbers are written
    table       the table of stages, for terminal and Markdown
    verdict     what a record says in a sentence or two
    examples    adversarial examples and what the networks answer
    plots       adversarial.png, and the points of the trade-off plot
    charts      the interactive trade-off plot and the inline SVG curves of the page
    html        report.html
    sweep       report.html of a sweep, from sweep_rows (what it shows), sweep_answers and sweep_panels
    evaluation  the table, the sentences and evaluation.html of one ``coldforge evaluate``
"""
