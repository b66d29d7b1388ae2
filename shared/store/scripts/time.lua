-- Tell the time, and which server process tells it. Touches no key.
-- Returns seconds, microseconds, run id ('' where a server has none).
local time = redis.call('TIME')
return {time[1], time[2], string.match(redis.call('INFO', 'server'), 'run_id:(%w*)') or ''}
