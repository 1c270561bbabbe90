package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import kotlin.concurrent.thread

class SessionTest {
    private fun picture(name: String) = Vectors.picture(Vectors.file("pictures/$name"))

    @Test fun `greedy answers about fifty pictures are Python's, token for token`() {
        val cases = Vectors.map("answers.json").objects("pictures")
        assertTrue(cases.size >= 50)
        Session(Vectors.bundle, Vectors.backend, Sampling(maxNewTokens = 24)).use { session ->
            for (case in cases) {
                session.reset()
                session.lookAt(picture(case.text("image")))
                val pieces = StringBuilder()
                val text = session.stream(case.text("question")) { pieces.append(it.text) }
                assertEquals(case.text("name"), case.ints("ids"), session.answerIds)
                assertEquals(case.text("text"), text)
                assertEquals(text, pieces.toString())
            }
        }
    }

    @Test fun `conversations of several turns and pictures are Python's, and so is what the cache saves`() {
        for (case in Vectors.map("answers.json").objects("conversations")) {
            val sampling =
                Sampling(20, temperature = case.number("temperature"), topP = case.number("top_p"), seed = case["seed"] as Long?)
            Session(Vectors.bundle, Vectors.backend, sampling, case.text("system")).use { session ->
                for (turn in case.objects("turns")) {
                    turn.texts("images").forEach { session.lookAt(picture(it)) }
                    assertEquals(turn.text("answer"), session.reply(turn.text("text")))
                    assertEquals(turn.ints("ids"), session.answerIds)
                    assertEquals(turn.int("prompt_tokens"), session.stats!!.promptTokens)
                    assertEquals(turn.int("cached_tokens"), session.stats!!.cachedTokens)
                }
            }
        }
    }

    @Test fun `an answer that is stopped ends where it is, and the conversation goes on`() {
        val question = "Tell me a long story about a house."
        val (whole, then) =
            Session(Vectors.bundle, Vectors.backend, Sampling(maxNewTokens = 40)).use { it.reply(question) to it.messages.size }
        assertEquals(2, then)
        Session(Vectors.bundle, Vectors.backend, Sampling(maxNewTokens = 40)).use { session ->
            val said = session.stream(question) { if (session.answerIds.size == 5) session.cancel() }
            assertTrue(said, whole.startsWith(said) && said.length < whole.length && said.isNotEmpty())
            assertEquals(said, session.messages.last().text)
            assertTrue(session.reply("Go on.").isNotEmpty())
            // The cache is taken up where the answer was stopped.
            assertTrue(session.stats!!.toString(), session.stats!!.cachedTokens > 30)
            assertEquals(4, session.messages.size)
        }
    }

    @Test fun `a stop while the prompt is read takes effect at once and forgets the turn`() {
        Session(Vectors.bundle, Vectors.backend, Sampling(maxNewTokens = 5)).use { session ->
            session.reply("Hello")
            val long = "A house stands on a hill. ".repeat(300)
            var told = 0L
            val stopper =
                thread {
                    Thread.sleep(700)
                    told = System.nanoTime()
                    session.cancel()
                }
            val said = session.stream(long) {}
            val waited = secondsSince(told)
            stopper.join()
            assertEquals("", said)
            assertEquals(2, session.messages.size)
            assertTrue("$waited s", waited < 2)
            assertTrue(session.reply("And now?").isNotEmpty())
        }
    }

    @Test fun `a prompt in chunks says what a prompt in one piece says`() {
        val text = ("The quick brown fox jumps over the lazy dog near a house and a tree. ").repeat(45)
        val answers =
            listOf(Sampling(maxNewTokens = 8)).map { sampling ->
                Session(Vectors.bundle, Vectors.backend, sampling).use { session ->
                    session.reply(text)
                    assertTrue(session.stats!!.promptTokens > 600)
                    session.answerIds.toList()
                }
            }
        // Fed word by word through the cache, the same prompt must lead to the same place.
        Session(Vectors.bundle, Vectors.backend, Sampling(maxNewTokens = 8)).use { session ->
            session.reply(text.take(1000))
            session.reset()
            session.reply(text)
            assertEquals(answers[0], session.answerIds)
        }
    }

    @Test fun `a prompt that is too long is told, and the conversation stays as it was`() {
        Session(Vectors.bundle, Vectors.backend).use { session ->
            val error = runCatching { session.reply("house ".repeat(9000)) }.exceptionOrNull()
            assertTrue("$error", error is MobileMMError && "context is 8192" in error.message!!)
            assertEquals(0, session.messages.size)
        }
    }

    @Test fun `the golden check passes on this machine`() {
        val checks = SelfCheck(Vectors.bundle, Vectors.backend) { Vectors.picture(it) }.run()
        assertEquals(Vectors.bundle.manifest.golden.map { it.part } + "conversation", checks.map { it.part })
        assertTrue(checks.map { it.part }.containsAll(listOf("decoder", "embed", "vision")))
        checks.forEach { assertTrue(it.toString(), it.passed) }
    }

    @Test fun `the golden check tells which part was changed`() {
        val bundle = Vectors.bundle
        val changed =
            object : Backend by Vectors.backend {
                override fun run(
                    part: String,
                    inputs: Map<String, Tensor>,
                ) = Vectors.backend.run(part, inputs).onEach { (_, tensor) ->
                    if (part == "vision") tensor.floats().let { floats -> repeat(floats.limit()) { floats.put(it, floats.get(it) * 1.1f) } }
                }
            }
        val failed = SelfCheck(bundle, changed) { Vectors.picture(it) }.run().filter { !it.passed }
        assertEquals(listOf("vision"), failed.map { it.part })
    }

    @Test fun `a token allocates less than 64 kB`() {
        val threads = java.lang.management.ManagementFactory.getThreadMXBean() as com.sun.management.ThreadMXBean
        val own = Thread.currentThread().id
        Session(Vectors.bundle, Vectors.backend, Sampling(maxNewTokens = 120)).use { session ->
            val marks = ArrayList<Pair<Int, Long>>()
            session.stream("Tell me a long story about a house.") {
                marks += session.answerIds.size to threads.getThreadAllocatedBytes(own)
            }
            val (first, last) = marks.first { it.first > 20 } to marks.last()
            val each = (last.second - first.second) / (last.first - first.first)
            println("$each bytes allocated a token")
            assertTrue("$each bytes", each < 64 * 1024)
        }
    }
}
