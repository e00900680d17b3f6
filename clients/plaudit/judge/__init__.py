"""AI feedback: comparisons labelled by a chat model under a written constitution (Bai et al., 2212.08073; Lee et al.,
2309.00267), with people for what it must not decide alone: `plaudit judge`.

label    comparisons -> rows with the judge's label, and a queue for people
gate     whether the judge agrees with people well enough
report   position bias, agreement of the two orders, failures, cost
"""
