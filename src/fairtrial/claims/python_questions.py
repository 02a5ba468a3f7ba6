"""Statements about Python with a right and a wrong end, written for claims on preferences between answers."""

from typing import NamedTuple


class Question(NamedTuple):
    """A beginning, the end that makes it true, and one that makes it false."""

    prompt: str
    right: str
    wrong: str


_LINES = """
A tuple in Python, once it is made, is | immutable | mutable
A list in Python, once it is made, is | mutable | immutable
The keyword that defines a function is | def | class
The keyword that defines a class is | class | def
An empty list in Python is | false | true
The number zero in Python is | false | true
The index of the first element of a list is | zero | one
The function that gives the number of elements is | len | sum
The function that adds up the elements of a list is | sum | len
The statement that leaves a loop early is | break | continue
The statement that begins the next turn of a loop is | continue | break
The statement that does nothing at all is | pass | return
A function without a return statement returns | None | zero
To catch an exception after try one writes | except | catch
To raise an exception in Python one writes | raise | throw
Code that runs whether or not an error occurred stands after | finally | else
The keys of a dictionary must be | hashable | sorted
The elements of a set are always | unique | sorted
Division of two integers with a single slash gives | a float | an integer
The operator for the power of a number is | two stars | a caret
Blocks of code in Python are marked by | indentation | braces
A comment in Python begins with | a hash sign | two slashes
The boolean constants of Python are | True and False | true and false
The first argument of a method is by convention | self | this
A method that sets up a new object is named | __init__ | __new_object__
To use the code of another module one writes | import | include
An anonymous function is written with | lambda | function
A function that yields values is called | a generator | a constructor
Strings in Python are sequences of | Unicode characters | signed bytes
The method that adds an element to a list is | append | push
The logical operator that negates is | not | an exclamation mark
To test two objects for identity one writes | is | equals
To test whether an element is in a list one writes | in | has
The type of the literal 3.5 is | float | int
The type of the literal 'abc' is | str | char
Sorting with the function sorted returns | a new list | nothing
Sorting with the method sort of a list returns | None | a new list
A loop over the elements of a list begins with | for | foreach
The condition after if has an alternative after | else | otherwise
A file opened in a with statement is afterwards | closed | open
"""

QUESTIONS = tuple(
    Question(prompt.strip(), f" {right.strip()}", f" {wrong.strip()}")
    for prompt, right, wrong in (line.split("|") for line in _LINES.strip().splitlines())
)
