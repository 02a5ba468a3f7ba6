from fairtrial.spelling import nearest


def test_the_nearest_words_of_few_many_and_none():
    assert nearest("optimiser", ["optimizer", "loss"]) == "did you mean optimizer?"
    assert nearest("ADAMP", ["AdamP", "adam"]) == "did you mean AdamP or adam?"
    assert nearest("x", []) == "there is: none"
    assert nearest("x", ["one", "two"]) == "there is: one, two"
    assert nearest("qqq", [f"option{k}" for k in range(31)]) == "none of the 31 known ones is near"
