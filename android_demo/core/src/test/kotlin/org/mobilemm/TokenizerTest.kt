package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test

class TokenizerTest {
    private fun compare(
        name: String,
        least: Int,
    ) {
        val tokenizer = Tokenizer.read(Vectors.file("tokenizers/$name.tokenizer.json"))
        val cases = Vectors.objects("tokenizers/$name.json")
        assertTrue(cases.size >= least)
        for (case in cases) {
            val text = case.text("text")
            assertEquals(shown(text, 500), case.ints("ids"), tokenizer.encode(text, special = name == "llama3"))
            val said = case.ints("said")
            assertEquals(said.toString(), case.text("decoded"), tokenizer.decode(said))
            val stream = TextStream({ tokenizer.decode(it) }, case.texts("stop"))
            val pieces = said.map(stream::put) + stream.end()
            assertEquals(said.toString(), case.texts("pieces"), pieces)
        }
    }

    @Test fun `ids and streamed texts of the default bundle's tokenizer are Python's`() = compare("default", 1000)

    @Test fun `those of LLaMA 3's kind are`() = compare("llama3", 250)

    @Test fun `those of LLaMA's kind are`() = compare("llama", 250)

    @Test fun `those with a Metaspace are`() = compare("metaspace", 250)

    @Test fun `those with the ids of SentencePiece are`() = compare("sentencepiece", 250)

    @Test fun `those of Gemma's kind are`() = compare("gemma", 250)

    @Test fun `a placeholder in somebody's words is text`() {
        val tokenizer = Tokenizer.read(Vectors.file("tokenizers/default.tokenizer.json"))
        val plain = tokenizer.without(2)
        assertEquals(listOf(2), tokenizer.encode("<|im_end|>"))
        assertTrue(plain.encode("<|im_end|>").size > 1)
    }

    @Test fun `what is not known is refused by name`() {
        val file = java.io.File.createTempFile("tokenizer", ".json")
        for ((text, word) in listOf(
            "{}" to "'model'",
            """{"model": {"type": "Unigram"}}""" to "Unigram",
            """{"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": {"type": "BertNormalizer"}}""" to "BertNormalizer",
            """{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}""" to "vocab",
            """{"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b c"]}}""" to "merge",
            "[" to "JSON",
        )) {
            file.writeText(text)
            val error = runCatching { Tokenizer.read(file) }.exceptionOrNull()
            assertTrue("$text: $error", error is MobileMMError && word in error.message!!)
        }
    }
}
