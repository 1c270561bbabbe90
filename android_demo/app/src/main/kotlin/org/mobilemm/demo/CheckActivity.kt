package org.mobilemm.demo

import android.app.Activity
import android.os.Bundle
import android.widget.Button
import android.widget.TextView

/** The bundle's golden vectors and conversation, run on this very device. */
open class CheckActivity : Activity() {
    private val chat get() = (application as DemoApplication).chat
    private val lines = ArrayList<String>()
    private var verdict: Int = 0
    private val listener = { showPhase() }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.check)
        actionBar?.setDisplayHomeAsUpEnabled(true)
        findViewById<Button>(R.id.run).setOnClickListener { check() }
        savedInstanceState?.getStringArrayList(LINES)?.let(lines::addAll)
        verdict = savedInstanceState?.getInt(VERDICT) ?: 0
        show()
        if (verdict == 0) check()
    }

    override fun onStart() {
        super.onStart()
        chat.listen(listener)
    }

    override fun onStop() {
        chat.unlisten(listener)
        super.onStop()
    }

    override fun onSaveInstanceState(outState: Bundle) {
        super.onSaveInstanceState(outState)
        outState.putStringArrayList(LINES, lines)
        outState.putInt(VERDICT, verdict)
    }

    private fun check() {
        if (chat.isBusy) return
        lines.clear()
        verdict = R.string.checking
        show()
        chat.check(
            report = { passed, line ->
                val (part, text) = line.split(": ", limit = 2)
                lines += getString(if (passed) R.string.check_line_passed else R.string.check_line_failed, part, text)
                show()
            },
            done = { passed ->
                verdict =
                    when (passed) {
                        true -> R.string.check_passed
                        false -> R.string.check_failed
                        null -> 0
                    }
                show()
            },
        )
    }

    private fun showPhase() {
        val failed = chat.phase as? Phase.Failed ?: return
        findViewById<TextView>(R.id.verdict).text = failed.message
    }

    private fun show() {
        findViewById<TextView>(R.id.verdict).text = if (verdict == 0) "" else getString(verdict)
        findViewById<TextView>(R.id.checks).text = lines.joinToString("\n")
        findViewById<Button>(R.id.run).isEnabled = verdict != R.string.checking
    }

    private companion object {
        const val LINES = "lines"
        const val VERDICT = "verdict"
    }
}
