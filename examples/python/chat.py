"""A chat in the terminal:  python chat.py [model]

The same as `smallm chat`, as a program of one's own: the history is a list of messages, and the
answer is printed as it comes.
"""

import sys

import smallm


def main() -> None:
    messages: list[dict[str, str]] = []
    with smallm.load(sys.argv[1] if len(sys.argv) > 1 else None) as model:
        while True:
            try:
                question = input("> ")
            except EOFError:
                return
            messages.append({"role": "user", "content": question})
            with model.stream(messages, max_tokens=512, on_overflow="truncate_left") as answer:
                for chunk in answer:
                    print(chunk.text, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": answer.completion.text})


if __name__ == "__main__":
    main()
