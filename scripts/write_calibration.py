"""Writes the calibration set that ships: the default model's own conversations about fixed questions.

    python scripts/write_calibration.py export/calibration_data

Answers are sampled (temperature 0.8, fixed seed), so that nobody's text is needed; the pictures are
those of docs/drawings.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import mobilemm
from mobilemm.runtime.pytorch import ChatSession, quiet
from mobilemm.runtime.sampling import Sampling

DRAWINGS = Path(__file__).parents[1] / "docs" / "drawings"
SEED, BATCH = 20260, 14

QUESTIONS = [
    "What is gravity?",
    "Explain photosynthesis to a child.",
    "Write a short story about a lighthouse keeper and a storm.",
    "How do I boil an egg?",
    "Give me a recipe for vegetable soup.",
    "Write a Python function that reverses a string.",
    "What is the capital of France, and what is it known for?",
    "Who wrote Romeo and Juliet? Tell me about the author.",
    "Summarize the causes of the First World War.",
    "What is 17 + 25? Show the steps.",
    "A train travels 60 km in 45 minutes. How fast is it in km/h?",
    "Translate into French: 'Where is the train station?'",
    "Translate into Spanish: 'The weather is beautiful today.'",
    "Write an email to my landlord about a broken heater.",
    "List five tips for sleeping better.",
    "What are the symptoms of a cold?",
    "Describe the water cycle.",
    "How does a computer store numbers?",
    "Explain what a neural network is.",
    "Write a SQL query that counts the customers of each country.",
    "Write a poem about autumn.",
    "What is the difference between a crocodile and an alligator?",
    "How should I prepare for a job interview?",
    "Tell me a joke about cats.",
    "Which planets have rings?",
    "Write a product description for a pair of running shoes.",
    "What is inflation, and why does it matter?",
    "How do vaccines work?",
    "Plan a weekend in Rome for two people.",
    "Write a dialogue between a teacher and a student who is late.",
    "What does the phrase 'break the ice' mean?",
    "Correct the grammar: 'She go to school every days.'",
    "Give me the HTML of a page with a heading and a list.",
    "Explain recursion with an example.",
    "What happened during the Apollo 11 mission?",
    "How do bees make honey?",
    "Write a letter from a soldier to his family.",
    "Name three renewable sources of energy and compare them.",
    "What is a black hole?",
    "How do I change a bicycle tyre?",
    "Write a bash command that finds all files larger than one megabyte.",
    "Classify the sentiment: 'The food was cold and the waiter was rude.'",
    "Extract the names and dates: 'Marie Curie was born on 7 November 1867 in Warsaw.'",
    "Rewrite more politely: 'Send me the report now.'",
    "What are prime numbers? List the first ten.",
    "Describe a forest at night.",
    "How does a refrigerator work?",
    "What should I see in Japan in spring?",
    "Write the opening of a detective novel.",
    "Explain supply and demand.",
    "Give three arguments for and against school uniforms.",
    "Write a JSON object that describes a book.",
    "Who was Nelson Mandela?",
    "What is the boiling point of water in Fahrenheit, and why does it change with altitude?",
    "How can I save money each month?",
    "Write instructions for planting tomatoes.",
]
PICTURE_QUESTIONS = ["What is in this picture?", "Describe the image.", "What is this?", "What do you see?"]


@torch.inference_mode()
def sample_answers(
    model: Any, processor: Any, questions: list[str], seed: int, max_new_tokens: int
) -> list[str]:
    """One sampled answer to each question, without pictures."""
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    answers = []
    for start in range(0, len(questions), BATCH):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + BATCH]]
        inputs = processor.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt")
        ids = model.language_model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def main(target: str) -> None:
    quiet()
    folder = Path(target)
    model, processor = mobilemm.load()
    samples = [
        {
            "files": [],
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }
        for question, answer in zip(
            QUESTIONS, sample_answers(model, processor, QUESTIONS, SEED, 160), strict=True
        )
    ]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    session = ChatSession(model, processor, Sampling(max_new_tokens=40))
    for index, picture in enumerate(sorted(DRAWINGS.glob("*.png"))):
        shutil.copyfile(picture, folder / "pictures" / picture.name)
        question = PICTURE_QUESTIONS[index % len(PICTURE_QUESTIONS)]
        session.reset()
        session.look_at(picture)
        answer = session.reply(question).strip()
        samples.append(
            {
                "files": [f"pictures/{picture.name}"],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            }
        )
    # A picture after every five texts: whoever stops early has seen both.
    texts, pictures = samples[: len(QUESTIONS)], samples[len(QUESTIONS) :]
    mixed = [
        sample
        for index in range(len(pictures))
        for sample in (*texts[5 * index : 5 * index + 5], pictures[index])
    ]
    mixed += texts[5 * len(pictures) :]
    text = json.dumps(mixed, indent=1, ensure_ascii=False)
    (folder / "calibration.json").write_text(text + "\n", encoding="utf-8")
    print(f"{folder / 'calibration.json'}: {len(mixed)} conversations, {len(text):,} characters")


if __name__ == "__main__":
    main(*sys.argv[1:])
