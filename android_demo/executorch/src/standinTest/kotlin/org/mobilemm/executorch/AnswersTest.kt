package org.mobilemm.executorch

import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import org.mobilemm.Backend
import org.mobilemm.Bundle
import org.mobilemm.Json
import org.mobilemm.Sampling
import org.mobilemm.SelfCheck
import org.mobilemm.Session
import org.mobilemm.Vectors
import org.mobilemm.drawsAsPython
import org.mobilemm.ints
import org.mobilemm.number
import org.mobilemm.objects
import org.mobilemm.text
import org.mobilemm.texts
import java.io.File

/** Bundles for ExecuTorch on its own runtime, against what Python's session said (`python -m tests.android.executorch_vectors`). */
class AnswersTest {
    private val folder = File(System.getProperty("mobilemm.executorch") ?: error("-Dmobilemm.executorch=FOLDER is missing"))

    @Suppress("UNCHECKED_CAST")
    private val cases = Json.parse(File(folder, "answers.json").readBytes()) as List<Map<String, Any?>>

    private fun picture(name: String) = Vectors.picture(File(folder, name))

    private fun each(action: (Map<String, Any?>, Bundle, Backend) -> Unit) {
        assertTrue(cases.isNotEmpty())
        for (case in cases) {
            val bundle = Bundle.open(File(case.text("bundle")))
            Backend.open(bundle, threads = 1).use { action(case, bundle, it) }
        }
    }

    @Test fun `greedy answers about pictures are Python's, token for token`() =
        each { case, bundle, backend ->
            val asked = case.objects("pictures")
            assertTrue(asked.size >= 4)
            Session(bundle, backend, Sampling(maxNewTokens = 24)).use { session ->
                for (one in asked) {
                    session.reset()
                    session.lookAt(picture(one.text("image")))
                    assertEquals(one.text("text"), session.reply(one.text("question")))
                    assertEquals(one.ints("ids"), session.answerIds)
                }
            }
            println("${bundle.manifest.model.name}: ${asked.size} answers, ${asked.sumOf { it.ints("ids").size }} tokens, are Python's")
        }

    @Test fun `conversations of several turns and pictures are Python's, and so is what the cache saves`() =
        each { case, bundle, backend ->
            for (conversation in case.objects("conversations")) {
                val warm = conversation.number("temperature")
                val sampling = if (warm > 0) Sampling(12, temperature = warm, topP = 0.95, seed = 7) else Sampling(12)
                Session(bundle, backend, sampling).use { session ->
                    for (turn in conversation.objects("turns")) {
                        turn.texts("images").forEach { session.lookAt(picture(it)) }
                        assertEquals(turn.text("text"), session.reply(turn.text("question")))
                        assertEquals(turn.ints("ids"), session.answerIds)
                        assertEquals((turn["cached_tokens"] as Long).toInt(), session.stats!!.cachedTokens)
                    }
                }
            }
        }

    @Test fun `the same pictures for a seed as in Python, and the same sketches`() =
        each { case, bundle, backend ->
            val generation = bundle.manifest.generation
            assertEquals(generation != null, "drawings" in case)
            if (generation != null) {
                val sketches = if (generation.schedules == null) 0 else generation.steps - 1
                drawsAsPython(bundle, backend, File(folder, case.text("drawings")), sketches)
            }
        }

    @Test fun `the golden check passes`() =
        each { _, bundle, backend ->
            val checks = SelfCheck(bundle, backend) { Vectors.picture(it) }.run()
            assertEquals(bundle.manifest.golden.map { it.part } + bundle.manifest.conversations.map { "conversation" }, checks.map { it.part })
            assertTrue(checks.map { it.part }.containsAll(listOf("decoder", "embed", "vision")))
            checks.forEach { assertTrue(it.toString(), it.passed) }
            println("${bundle.manifest.model.name}: ${checks.joinToString { "${it.part} ${it.text}" }}")
        }
}
