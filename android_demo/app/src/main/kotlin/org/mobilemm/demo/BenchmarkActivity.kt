package org.mobilemm.demo

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.util.Log
import android.view.View
import android.view.WindowManager
import android.widget.Button
import android.widget.TextView
import org.mobilemm.BenchmarkSettings

/**
 * Measures a bundle, and draws what was found.
 *
 *     adb shell am start -n org.mobilemm.demo/.BenchmarkActivity --ez run true --es bundle NAME --ei prompt_tokens 144 \
 *         --ei new_tokens 64 --ei runs 5 --ei images 1 --ei threads 0 --es out result.json
 *
 * measures `bench/NAME` in the app's folder of external files, without `bundle` the one in use, and writes the result
 * there, in the schema of `mobilemm bench`. What is measured, and why there is no result, stands in `result.json.state`
 * and in the log under the tag MobileMMBench. `mobilemm bench --device adb:` is what calls it.
 */
open class BenchmarkActivity : Activity() {
    private val benchmarks get() = (application as DemoApplication).benchmarks
    private val listener = { show() }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.benchmark)
        actionBar?.setDisplayHomeAsUpEnabled(true)
        benchmarks.files.create()
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
        // What runs in the dark behind the lock gets the slow cores.
        @Suppress("DEPRECATION")
        window.addFlags(WindowManager.LayoutParams.FLAG_SHOW_WHEN_LOCKED or WindowManager.LayoutParams.FLAG_TURN_SCREEN_ON)
        val settings = BenchmarkSettings.of { if (intent.hasExtra(it)) intent.getIntExtra(it, 0) else null }
        // A name, and no way out of the folder.
        val out = (intent.getStringExtra("out") ?: DEFAULT_OUT).filter { it.isLetterOrDigit() || it in "._-" }.trimStart('.')
        Log.i(Benchmarks.TAG, "start $settings")
        benchmarks.start(settings, out.ifEmpty { DEFAULT_OUT }, intent.getStringExtra("bundle"))
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
        findViewById<View>(R.id.chart).keepScreenOn = benchmarks.isRunning
    }

    private companion object {
        const val DEFAULT_OUT = "benchmark.json"
    }
}
