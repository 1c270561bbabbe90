package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Test
import java.nio.FloatBuffer

class SamplerTest {
    @Test fun `the tokens that are drawn are Python's`() {
        val all = Vectors.map("sampling.json")
        val vocabulary = all.int("vocabulary")
        val logits = Vectors.floats("logits.f32")
        for (case in all.objects("cases")) {
            val sampling =
                Sampling(
                    temperature = case.number("temperature"),
                    topK = case.int("top_k"),
                    topP = case.number("top_p"),
                    repetitionPenalty = case.number("repetition_penalty"),
                    seed = case["seed"] as Long?,
                    minP = case.number("min_p"),
                )
            val sampler = Sampler(sampling)
            val seen = mutableListOf(5, 6, vocabulary + 1)
            val tokens =
                List(40) { step ->
                    val row = FloatBuffer.wrap(logits, step % 8 * vocabulary, vocabulary).slice()
                    sampler.choose(row, vocabulary, seen).also { seen += it }
                }
            assertEquals(sampling.toString(), case.ints("tokens"), tokens)
        }
    }

    @Test fun `random numbers are those of the paper's generator`() {
        assertEquals(6457827717110365317L, SplitMix64(1234567).next())
    }
}
