package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test

class PromptTest {
    private val manifest get() = Vectors.bundle.manifest

    private fun messages(values: List<Map<String, Any?>>) =
        values.map { message ->
            val content = message.objects("content")
            Message(message.text("role"), content.filter { it["type"] == "text" }.joinToString("") { it.text("text") }, content.count { it["type"] == "image" })
        }

    @Test fun `the manifest's examples are rendered and tokenized as in Python`() {
        val model = manifest.model
        val tokenizer =
            PromptTokenizer(
                Tokenizer.read(Vectors.bundle.file(manifest.prompt.tokenizer)),
                manifest.prompt,
                model.imageTokenId,
                model.numImageTokens,
            )
        assertTrue(manifest.prompt.examples.size >= 3)
        for (example in manifest.prompt.examples) {
            val messages = messages(example.messages)
            assertEquals(example.rendered, render(manifest.prompt, messages).joinToString("<image>"))
            assertEquals(example.inputIds, tokenizer.encode(messages))
        }
    }

    @Test fun `rules of every kind are rendered as in Python`() {
        for (case in Vectors.map("prompts.json").objects("rendered")) {
            @Suppress("UNCHECKED_CAST")
            val prompt = prompt(case["prompt"] as Map<String, Any?>)
            val messages = case.objects("messages").map { Message(it.text("role"), it.text("text"), it.int("images")) }
            assertEquals(case.text("rendered"), render(prompt, messages).joinToString("<image>"))
        }
    }

    @Test fun `positions in three dimensions are Python's`() {
        @Suppress("UNCHECKED_CAST")
        val case = Vectors.map("prompts.json")["rope"] as Map<String, Any?>
        assertEquals(case["positions"], ropePositions(case.ints("ids"), 9, 2, 3).map { it.toList() })
    }

    private fun prompt(of: Map<String, Any?>): Prompt {
        @Suppress("UNCHECKED_CAST")
        fun turn(key: String) =
            (of.getValue(key) as Map<String, Any?>).let {
                Turn(it.text("prefix"), it.text("suffix"), it["prefix_before_image"] as String?, it["text"] as Boolean)
            }
        return Prompt(
            "tokenizer.json",
            of.text("begin"),
            turn("system"),
            turn("user"),
            turn("assistant"),
            of.text("generation"),
            turn("later_user"),
            turn("user_after_system"),
            of.text("image_prefix"),
            of.text("image_suffix"),
            of.text("strip"),
            of["add_bos"] as Boolean,
            emptyList(),
            emptyList(),
        )
    }
}
