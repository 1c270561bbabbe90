package org.mobilemm.demo

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.util.Log
import android.widget.Button
import android.widget.TextView
import org.mobilemm.BenchmarkSettings

/**
 * Measures the bundle in use, and draws what was found.
 *
 *     adb shell am start -n org.mobilemm.demo/.BenchmarkActivity --ez run true --ei prompt_tokens 144 \
 *         --ei new_tokens 64 --ei runs 5 --ei images 1 --ei threads 0 --es out result.json
 *
 * writes the result, in the schema of `mobilemm bench`, to `out` in the app's folder of external files, and logs one
 * line under the tag MobileMMBench when it is there, or why it is not.
 */
open class BenchmarkActivity : Activity() {
    private val benchmarks get() = (application as DemoApplication).benchmarks
    private val listener = { show() }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.benchmark)
        actionBar?.setDisplayHomeAsUpEnabled(true)
        findViewById<Button>(R.id.run).setOnClickListener {
            if (benchmarks.isRunning) benchmarks.cancel() else benchmarks.start(BenchmarkSettings(runs = 3), DEFAULT_OUT)
        }
        findViewById<Button>(R.id.share).setOnClickListener { share() }
        // A rotated screen must not begin anew.
        if (savedInstanceState == null) begin(intent)
    }

    override fun onNewIntent(intent: Intent) {
        super.onNewIntent(intent)
        begin(intent)
    }

    override fun onStart() {
        super.onStart()
        benchmarks.listen(listener)
        show()
    }

    override fun onStop() {
        benchmarks.unlisten(listener)
        super.onStop()
    }

    private fun begin(intent: Intent) {
        if (!intent.getBooleanExtra("run", false)) return
        val default = BenchmarkSettings()

        fun number(
            name: String,
            otherwise: Int,
            least: Int,
            most: Int,
        ) = intent.getIntExtra(name, otherwise).coerceIn(least, most)
        val settings =
            BenchmarkSettings(
                promptTokens = number("prompt_tokens", default.promptTokens, 1, 4096),
                newTokens = number("new_tokens", default.newTokens, 2, 4096),
                images = number("images", default.images, 0, 8),
                runs = number("runs", default.runs, 1, 100),
                threads = number("threads", default.threads, 0, 64),
            )
        // A name, and no way out of the folder.
        val out = (intent.getStringExtra("out") ?: DEFAULT_OUT).filter { it.isLetterOrDigit() || it in "._-" }.trimStart('.')
        Log.i(Benchmarks.TAG, "start $settings")
        benchmarks.start(settings, out.ifEmpty { DEFAULT_OUT })
    }

    private fun share() {
        val json = benchmarks.json ?: return
        startActivity(Intent.createChooser(Intent(Intent.ACTION_SEND).setType("application/json").putExtra(Intent.EXTRA_TEXT, json), null))
    }

    private fun show() {
        findViewById<TextView>(R.id.status).text = benchmarks.status ?: getString(R.string.benchmark_about)
        findViewById<Button>(R.id.run).setText(if (benchmarks.isRunning) R.string.stop else R.string.run_benchmark)
        findViewById<Button>(R.id.share).isEnabled = benchmarks.json != null && !benchmarks.isRunning
        findViewById<ChartView>(R.id.chart).figures = benchmarks.figures
    }

    private companion object {
        const val DEFAULT_OUT = "benchmark.json"
    }
}
